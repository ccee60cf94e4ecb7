"""CPU tensors: mfa.attention against torch's scaled_dot_product_attention, in one run.

Medians of torch.utils.benchmark, from measurements that alternate, so that both sides see the same machine.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Measurement, Timer

from .. import attention

_Case = tuple[Callable[[], object], Callable[[], object]]


class Row(NamedTuple):
    """One line of the table."""

    name: str
    torch_ms: float
    mfa_ms: float
    goal: float

    @property
    def ratio(self) -> float:
        return self.mfa_ms / self.torch_ms


def _tensors(dtype: torch.dtype, length: int, heads: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, dim, generator=generator).to(dtype) for _ in range(3)]


def _case(dtype: torch.dtype, length: int, training: bool, theirs: dict[str, Any], ours: dict[str, Any]) -> _Case:
    """Both sides on the same tensors, each with its arguments; `training`: with the gradients of all three."""
    tensors = [tensor.requires_grad_(training) for tensor in _tensors(dtype, length, heads=8, dim=64)]

    def side(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], object]:
        if not training:
            return lambda: function(*tensors, **arguments)
        return lambda: torch.autograd.grad(function(*tensors, **arguments).sum(), tensors)

    return side(scaled_dot_product_attention, theirs), side(attention, ours)


def _plain(dtype: torch.dtype, length: int, is_causal: bool, training: bool = False) -> _Case:
    arguments = {"is_causal": is_causal}
    return _case(dtype, length, training, arguments, arguments)


def _window(dtype: torch.dtype, length: int, left: int, training: bool = False) -> _Case:
    """Causal, `left` keys back; torch gets the equivalent mask, made beforehand."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().triu(-left)
    return _case(dtype, length, training, {"attn_mask": mask}, {"window": (left, 0)})


def _grouped(dtype: torch.dtype, length: int) -> _Case:
    query, key, value = _tensors(dtype, length, heads=8, dim=64)
    key, value = key[:, :2], value[:, :2]
    return (
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        lambda: attention(query, key, value, is_causal=True, enable_gqa=True),
    )


def cases(lengths: Sequence[int]) -> dict[str, tuple[_Case, float]]:
    """Name -> what to time, and the ratio to reach."""
    table: dict[str, tuple[_Case, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for length in lengths:
            table[f"{short} dense L={length}"] = (_plain(dtype, length, is_causal=False), 1.05)
            table[f"{short} causal L={length}"] = (_plain(dtype, length, is_causal=True), 1.05)
            table[f"{short} training dense L={length}"] = (_plain(dtype, length, is_causal=False, training=True), 1.1)
        table[f"{short} causal grouped L={lengths[-1]}"] = (_grouped(dtype, lengths[-1]), 1.05)
        table[f"{short} window 256 L=8192"] = (_window(dtype, 8192, left=256), 0.2)
        table[f"{short} training window 256 L=8192"] = (_window(dtype, 8192, left=256, training=True), 0.25)
    return table


def measure(name: str, case: _Case, goal: float, rounds: int, seconds: float, threads: int) -> Row:
    """Times both sides alternately, `rounds` times `seconds` each."""
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in case]
    runs: list[list[Measurement]] = [[], []]
    for _ in range(rounds):
        for side, timer in zip(runs, timers, strict=True):
            side.append(timer.blocked_autorange(min_run_time=seconds / rounds))
    theirs, ours = (1e3 * Measurement.merge(side)[0].median for side in runs)
    return Row(name, theirs, ours, goal)


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench --cpu", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name has TEXT in it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], metavar="L")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each side of a case (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often the sides alternate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", action="store_true", help="comma-separated values")
    arguments = parser.parse_args(command_line)
    line = "{},{:.4g},{:.4g},{:.4g},{}" if arguments.csv else "{:36}{:>12.3f}{:>12.3f}{:>9.3f}{:>8}"
    header = "case,torch_ms,mfa_ms,ratio,goal" if arguments.csv else f"{'case':36}{'torch ms':>12}{'mfa ms':>12}"
    print(header if arguments.csv else f"{header}{'ratio':>9}{'goal':>8}")
    for name, (case, goal) in cases(arguments.lengths).items():
        if arguments.only in name:
            row = measure(name, case, goal, arguments.rounds, arguments.seconds, arguments.threads)
            print(line.format(row.name, row.torch_ms, row.mfa_ms, row.ratio, row.goal), flush=True)


if __name__ == "__main__":
    main()
