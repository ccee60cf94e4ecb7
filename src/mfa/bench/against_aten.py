"""Measures the calls that sdpa/policy.json is about, ATen's kernel against mfa's; gives the rows of this machine.

for each kernel of ATen, dtype, head dimension, with causal and without:
    time both, alternating, at each length
    where ATen wins by more than `margin`, there is a row
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from ..attention import attention
from ..sdpa import policy

LENGTHS = (16, 64, 256, 1024, 4096)
FUNCTIONS = {"ATen": scaled_dot_product_attention, "mfa": attention}


class Case(NamedTuple):
    dtype: str
    head_dim: int
    is_causal: bool
    length: int


# Seconds of a call, by ATen or by mfa.
Clock = Callable[[str, Case], float]


def times_as_fast(case: Case, clock: Clock, rounds: int) -> float:
    """How many times as fast ATen is: a ratio of medians over rounds in which both have their turn."""
    times = [(clock("ATen", case), clock("mfa", case)) for _ in range(rounds)]
    aten, ours = map(statistics.median, zip(*times, strict=True))
    return float(ours / aten)


def templates(table: Iterable[policy.Row]) -> list[policy.Row]:
    """A row for each kernel of ATen, of all calls that the table has it for."""
    found: dict[str, policy.Row] = {}
    for row in table:
        first = found.setdefault(row.kernel, row)
        found[row.kernel] = replace(
            first,
            dtype=sorted({*first.dtype, *row.dtype}),
            head_dim=sorted({*first.head_dim, *row.head_dim}),
            is_causal=[False, True],
            query_length=[min(first.query_length[0] or 0, row.query_length[0] or 0), None],
        )
    return list(found.values())


def rows(
    template: policy.Row, clock: Clock, source: str, rounds: int = 5, margin: float = 1.02
) -> Iterator[policy.Row]:
    """Those of the template's calls in which ATen wins, with the least that it does."""
    lengths = [length for length in LENGTHS if length >= (template.query_length[0] or 0)]
    for dtype, head_dim, is_causal in itertools.product(template.dtype, template.head_dim, template.is_causal):
        gains = {n: times_as_fast(Case(dtype, head_dim, is_causal, n), clock, rounds) for n in lengths}
        for wins, run in itertools.groupby(lengths, lambda length: gains[length] > margin):  # noqa: B023
            if not wins:
                continue
            measured = list(run)
            first = template.query_length[0] if measured[0] == lengths[0] else measured[0]
            last = None if measured[-1] == lengths[-1] else measured[-1]
            yield replace(
                template,
                dtype=[dtype],
                head_dim=[head_dim],
                is_causal=[is_causal],
                query_length=[first, last],
                times_as_fast=round(min(gains[length] for length in measured), 2),
                basis="measurement",
                source=source,
            )


def mps_clock(seconds: float) -> Clock:
    """Medians on this Mac's GPU."""

    def clock(name: str, case: Case) -> float:
        torch.manual_seed(0)
        shape = (1, 16, case.length, case.head_dim)
        tensors = [torch.randn(shape, device="mps", dtype=getattr(torch, case.dtype)) for _ in range(3)]
        scope = {"call": FUNCTIONS[name], "tensors": tensors, "is_causal": case.is_causal}
        timer = Timer("call(*tensors, is_causal=is_causal)", globals=scope)
        return float(timer.blocked_autorange(min_run_time=seconds).median)

    return clock


def report(machine: policy.Machine, clock: Clock, source: str, table: Iterable[policy.Row]) -> Iterator[str]:
    """Lines: the rows for this machine, to replace those of its family in policy.json."""
    for kernel in templates(table):
        own = replace(kernel, family=machine.family or "", matrix_unit=machine.matrix_unit)
        if not policy.has(machine, own):
            needed = f"torch {kernel.torch}, macOS {kernel.macos}, {kernel.unless} unset"
            yield f"# {kernel.kernel}: not here; it needs {needed}"
            continue
        found = list(rows(own, clock, source))
        yield f"# {kernel.kernel}: {len(found)} rows of {machine.family} for src/mfa/sdpa/policy.json"
        if found:
            yield ",\n".join(map(str, found))
