"""Times attention: a sweep of problems, forward and forward with backward, beside every backend that is installed.

Medians of torch.utils.benchmark, which waits for the device. On MPS the memory is what Metal's driver had to add; on a
CPU it is not measured.
"""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import backends, machine

SUITES: dict[str, dict[str, list[Any]]] = {
    # The problem that mps-flash-attn published timings of, and its neighbours.
    "seed": {"batch": [4], "heads": [8], "length": [512, 1024, 2048, 4096], "dim": [64], "causal": [False, True]},
    # The tables of flash-attention: 16k tokens, a hidden size of 2048.
    "flash": {"tokens": [16384], "length": [512, 1024, 2048, 4096, 8192, 16384], "dim": [64, 128, 256]},
    "quick": {"batch": [1], "heads": [4], "length": [256, 1024], "dim": [64], "causal": [False, True]},
}


class Case(NamedTuple):
    """One problem: self-attention of [batch, heads, length, dim]."""

    dtype: str
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool

    def operations(self, is_training: bool) -> float:
        """As flash-attention counts: 4 L^2 D per head, halved if causal, and 2.5 times that for the backward pass."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.dim * (0.5 if self.causal else 1)
        return forward * (3.5 if is_training else 1)


class Row(NamedTuple):
    """A measurement; `milliseconds` is None where the backend can't, and `error` says why."""

    case: Case
    backend: str
    is_training: bool
    milliseconds: float | None
    teraflops: float | None
    megabytes: float | None  # that Metal's driver added
    error: str = ""


def cases(suite: str, dtypes: Sequence[str], lengths: Sequence[int] = (), dims: Sequence[int] = ()) -> list[Case]:
    axes = SUITES[suite]
    lengths, dims = list(lengths) or axes["length"], list(dims) or axes["dim"]
    if "tokens" in axes:
        tokens = axes["tokens"][0]
        return [
            Case(dtype, max(1, tokens // length), max(1, 2048 // dim), length, dim, causal)
            for dtype, dim, causal, length in itertools.product(dtypes, dims, (False, True), lengths)
        ]
    products = itertools.product(dtypes, axes["batch"], axes["heads"], lengths, dims, axes["causal"])
    return [Case(*axis) for axis in products]


def tensors(case: Case, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.dim)
    query, key, value = (
        torch.randn(shape, device=device, dtype=getattr(torch, case.dtype), requires_grad=requires_grad)
        for _ in range(3)
    )
    return query, key, value


def train(call: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(call().sum(), list(inputs))


def driver_bytes(device: str) -> int | None:
    if device != "mps":
        return None
    torch.mps.synchronize()
    return torch.mps.driver_allocated_memory()


def measure(name: str, case: Case, function: backends.Attention, device: str, is_training: bool, seconds: float) -> Row:
    """The median, and what the first call added to the driver's memory; an error is part of the result."""
    try:
        inputs = tensors(case, device, is_training)
        forward = lambda: function(*inputs, case.causal)  # noqa: E731
        call = (lambda: train(forward, inputs)) if is_training else forward
        if device == "mps":
            torch.mps.empty_cache()
        before = driver_bytes(device)
        call()
        after = driver_bytes(device)
        median = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=seconds).median
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        return Row(case, name, is_training, None, None, None, reason[0] if reason else type(error).__name__)
    megabytes = None if before is None or after is None else (after - before) / 2**20
    return Row(case, name, is_training, 1e3 * median, case.operations(is_training) / median / 1e12, megabytes)


def sweep(problems: Sequence[Case], device: str, trains: Sequence[bool], seconds: float) -> Iterator[Row]:
    functions = backends.installed()
    for case, is_training in itertools.product(problems, trains):
        for name, function in functions.items():
            yield measure(name, case, function, device, is_training, seconds)
        array_call = None if is_training else backends.mlx_attention(*tensors(case, "cpu"), case.causal)
        if array_call is not None:
            median = Timer("call()", globals={"call": array_call}).blocked_autorange(min_run_time=seconds).median
            yield Row(case, "mlx", False, 1e3 * median, case.operations(False) / median / 1e12, None)


FIELDS = (*Case._fields, *Row._fields[1:])


def flat(row: Row) -> dict[str, Any]:
    return dict(zip(FIELDS, (*row.case, *row[1:]), strict=True))


def line(row: Row) -> str:
    case = row.case
    problem = f"{case.dtype} B{case.batch} H{case.heads} L{case.length} D{case.dim}" + (
        " causal" if case.causal else ""
    )
    text = f"{problem:40} {'training' if row.is_training else 'forward':9} {row.backend:16}"
    if row.milliseconds is None:
        return f"{text} {row.error}"
    memory = "" if row.megabytes is None else f"{row.megabytes:>9.0f} MB"
    return f"{text}{row.milliseconds:>11.3f} ms{row.teraflops:>9.3f} TFLOP/s{memory}"


def plot(rows: Sequence[Row], directory: Path) -> None:
    """Speed over length, speed-up over torch's own and memory, each per head dimension. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, int, bool, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.dtype, row.case.dim, row.case.causal, row.is_training), []).append(row)
    for (dtype, dim, causal, is_training), members in groups.items():
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4))
        base = {row.case: row.milliseconds for row in members if row.backend == "sdpa" and row.milliseconds}
        for name in dict.fromkeys(row.backend for row in members):
            own = [row for row in members if row.backend == name and row.milliseconds is not None]
            lengths = [row.case.length for row in own]
            speedups = [base.get(row.case, float("nan")) / (row.milliseconds or 1) for row in own]
            axes[0].plot(lengths, [row.teraflops for row in own], marker="o", label=name)
            axes[1].plot(lengths, speedups, marker="o", label=name)
            axes[2].plot(lengths, [row.megabytes or 0 for row in own], marker="o", label=name)
        for axis, label in zip(axes, ("TFLOP/s", "times as fast as sdpa", "MB that the driver added"), strict=True):
            axis.set(xscale="log", xlabel="length", ylabel=label)
            axis.legend()
        title = f"{dtype} D{dim}{' causal' if causal else ''}{' training' if is_training else ''}"
        figure.suptitle(title)
        figure.savefig(directory / f"{title.replace(' ', '_')}.png")
        pyplot.close(figure)


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[], metavar="L", help="instead of the suite's")
    parser.add_argument("--dims", nargs="+", type=int, default=[], metavar="D", help="instead of the suite's")
    parser.add_argument("--device", choices=["mps", "cpu"], default=None, help="default: mps, if our kernels run on it")
    parser.add_argument("--backward", action="store_true", help="time forward with backward too")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement (default %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with the environment")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="needs matplotlib")
    options = parser.parse_args(command_line)
    device = options.device or machine.best_device()
    environment = machine.environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    problems = cases(options.suite, options.dtypes, options.lengths, options.dims)
    rows = []
    for row in sweep(problems, device, (False, True) if options.backward else (False,), options.seconds):
        rows.append(row)
        print(line(row), flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(flat, rows))
    if options.json:
        report = {"environment": environment, "rows": [flat(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plots:
        try:
            plot(rows, options.plots)
        except ImportError as error:
            sys.exit(f"no plots: {error}; install the dependency group bench")
