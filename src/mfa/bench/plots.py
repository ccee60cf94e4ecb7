"""Draws what was timed: one figure per dtype, head dimension, mask and pass."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .chips import CHIPS, Chip
from .timed import Row, speedups


def chip_of(environment: Mapping[str, Any]) -> Chip | None:
    """The chip of a Mac, with as many cores as it has; None for one whose peak isn't known."""
    name = str(environment.get("chip", "")).removeprefix("Apple ")
    chip = next((chip for chip in CHIPS.values() if chip.name == name), None)
    cores = environment.get("gpu_cores")
    return chip._replace(cores=cores) if chip and cores else chip


def plot(rows: Sequence[Row], environment: Mapping[str, Any], directory: Path) -> None:
    """Roofline, speed-up over torch's own, and memory; the last two by length. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, int, bool, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.dtype, row.case.dim, row.case.causal, row.is_training), []).append(row)
    for (dtype, dim, causal, is_training), members in groups.items():
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4))
        _roofline(axes[0], members, chip_of(environment))
        _by_length(axes[1], members, speedups(members), "times as fast as sdpa")
        _by_length(axes[2], members, {row: row.megabytes for row in members}, "MB at the peak, without inputs")
        title = f"{dtype} D{dim}{' causal' if causal else ''}{' training' if is_training else ''}"
        figure.suptitle(title)
        figure.savefig(directory / f"{title.replace(' ', '_')}.png")
        pyplot.close(figure)


def intensity(row: Row) -> float:
    """Operations per byte that must move."""
    return row.case.operations(row.is_training) / row.case.compulsory_bytes(row.is_training)


def _roofline(axis: Any, rows: Sequence[Row], chip: Chip | None) -> None:
    for name, own in _by_backend(rows):
        timed = [row for row in own if row.teraflops is not None]
        axis.plot([intensity(row) for row in timed], [row.teraflops for row in timed], marker="o", label=name)
    if chip:
        ridge = chip.peak / (chip.bandwidth * 1e9)
        reached = [ridge, *map(intensity, rows)]
        ends = [min(reached) / 2, ridge, 2 * max(reached)]
        roof = [min(chip.peak, x * chip.bandwidth * 1e9) / 1e12 for x in ends]
        axis.plot(ends, roof, color="black", label=f"{chip.name}, float32")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axis.legend()


def _by_length(axis: Any, rows: Sequence[Row], values: Mapping[Row, float | None], label: str) -> None:
    for name, own in _by_backend(rows):
        known = [row for row in own if values[row] is not None]
        axis.plot([row.case.length for row in known], [values[row] for row in known], marker="o", label=name)
    axis.set(xscale="log", xlabel="length", ylabel=label)
    axis.legend()


def _by_backend(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """A line each, by length: a suite may have several batch sizes."""
    ordered = sorted(rows, key=lambda row: (row.backend, row.case.length))
    return [(name, list(own)) for name, own in itertools.groupby(ordered, key=lambda row: row.backend)]
