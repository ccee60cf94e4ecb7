"""`python -m mfa bench --figures DIRECTORY`: the README's figures, from the cost model and from counted memory.

What a figure shows lies in its SVG as JSON, in the metadata, so that a test can tell whether it is current.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import _native, _torch, attention
from . import kernels, model, report
from .chips import CHIPS

Data = dict[str, dict[str, float]]  # by series, by label

_CHIPS = ("m1-max", "m3-max")
_LENGTHS = [1 << power for power in range(10, 18)]
_HEADS, _HEAD_DIM = 32, 128
_COLOURS = {"mfa": "#d1495b", "MLX": "#8d96a3", "PyTorch's math backend": "#8d96a3"}


def share_of_peak() -> Data:
    """Predicted, float16, dense, N 4096: what the matrix products have of the GPU's float32 peak, in percent."""
    table = kernels.of_float16()
    data: Data = {}
    for chip in (CHIPS[name] for name in _CHIPS):
        for dim in report.HEAD_DIMS:
            problem = report.shape(dim)
            seconds = {
                "mfa": model.seconds(model.forward(table, problem, chip)),
                "MLX": report.steel(table, problem, chip).seconds,
            }
            for name, time in seconds.items():
                share = report.utilisation(problem, 2, time, chip)
                data.setdefault(f"{name}, {chip.name}", {})[f"D {dim}"] = round(100 * share, 1)
    return data


def memory() -> Data:
    """MiB that one call needs at its peak beside its inputs, by length; float16, 32 heads of 128, causal."""
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "mfa": attention,
        "PyTorch's math backend": scaled_dot_product_attention,
    }
    return {
        f"{name}, {'training' if training else 'forward'}": {
            str(length): round(_peak_bytes(call, length, training) / 2**20, 1) for length in _LENGTHS
        }
        for name, call in calls.items()
        for training in (False, True)
    }


def _peak_bytes(call: Callable[..., torch.Tensor], length: int, training: bool) -> int:
    """Of tensors that have no memory, so that any length can be counted."""
    shape = (1, _HEADS, length, _HEAD_DIM)
    with _torch.FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        inputs = [torch.empty(shape, dtype=torch.float16, requires_grad=training) for _ in range(3)]
        with _Allocations() as allocations:
            out = call(*inputs, is_causal=True)
            if training:
                torch.autograd.grad(out, inputs, torch.empty_like(out))
    peak = allocations.peak
    if training and call is attention:
        problem = {"family": "apple9", "dtype": "f16", "batch": 1, "query_heads": _HEADS, "key_heads": _HEADS}
        lengths = {"query_length": length, "key_length": length, "window_right": 0}
        dims = {"head_dim": _HEAD_DIM, "value_dim": _HEAD_DIM}
        plan = _native.plan_backward(**problem, **lengths, **dims, has_correction=True)
        statistics = 8 * _HEADS * length
        peak += plan.scratch_bytes + statistics  # the backward op's own, which a fake doesn't make
    return int(peak)


class _Allocations(_torch.TorchDispatchMode):
    """Bytes of the storages that ops make, at their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _torch.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = _torch.identity_of(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _plot_share(axes: Any, data: Data) -> None:
    for axis, chip in zip(axes, dict.fromkeys(series.split(", ")[1] for series in data), strict=True):
        for shift, name in ((-0.2, "MLX"), (0.2, "mfa")):
            values = data[f"{name}, {chip}"]
            bars = axis.bar(
                [i + shift for i in range(len(values))], values.values(), 0.38, color=_COLOURS[name], label=name
            )
            axis.bar_label(bars, fmt="%.0f", padding=1, fontsize=9)
        axis.set(title=f"{chip}, predicted", ylim=(0, 115), xticks=range(len(values)), xticklabels=values)
    axes[0].set_ylabel("% of the float32 peak, forward, float16")
    axes[0].legend(loc="upper left", ncols=2)


def _plot_memory(axes: Any, data: Data) -> None:
    for axis, mode in zip(axes, ("forward", "training"), strict=True):
        for name in ("PyTorch's math backend", "mfa"):
            values = data[f"{name}, {mode}"]
            axis.plot([int(length) for length in values], values.values(), marker="o", color=_COLOURS[name], label=name)
        axis.set(title=f"{mode}, counted", xscale="log", yscale="log", xlabel="queries and keys")
        axis.set_xticks(_LENGTHS[::2], [f"{length // 1024}k" for length in _LENGTHS[::2]], minor=False)
    axes[0].set_ylabel("MiB beside the inputs, 32 heads of 128")
    axes[0].legend(loc="upper left")


FIGURES: dict[str, tuple[Callable[[], Data], Callable[[Any, Data], None]]] = {
    "share-of-peak": (share_of_peak, _plot_share),
    "memory": (memory, _plot_memory),
}


def save(name: str, file: Any) -> None:
    """Writes the figure as SVG: the same bytes for the same data and release of matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    of, plot = FIGURES[name]
    data = of()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        plot(axes, data)
        made = {"command": "python -m mfa bench --figures docs/figures", "data": data}
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": json.dumps(made)})
        pyplot.close(figure)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench --figures", description=__doc__)
    parser.add_argument("directory", type=Path, help="where share-of-peak.svg and memory.svg go")
    directory = parser.parse_args(arguments).directory
    directory.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        with (directory / f"{name}.svg").open("wb") as file:
            save(name, file)
