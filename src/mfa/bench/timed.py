"""Times attention: forward, and forward with backward, beside every backend that is installed.

Medians of torch.utils.benchmark, which waits for the device, and how much memory a call takes at a time.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import backends
from .cases import Case, tensors
from .memory import peak_bytes


class Row(NamedTuple):
    """A measurement; `milliseconds` is None where the backend can't, and `error` says why."""

    case: Case
    is_training: bool
    backend: str
    milliseconds: float | None
    teraflops: float | None
    megabytes: float | None  # at the peak, without the inputs
    error: str = ""

    def __str__(self) -> str:
        text = f"{self.case!s:40} {'training' if self.is_training else 'forward':9} {self.backend:16}"
        if self.milliseconds is None:
            return f"{text} {self.error}"
        memory = "" if self.megabytes is None else f"{self.megabytes:>9.1f} MB"
        return f"{text}{self.milliseconds:>11.3f} ms{self.teraflops:>9.3f} TFLOP/s{memory}"


def train(call: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(call().sum(), list(inputs))


def measure(name: str, case: Case, function: backends.Attention, device: str, is_training: bool, seconds: float) -> Row:
    """The memory of the first call, and the median time of those that follow; an error is part of the result."""
    try:
        inputs = tensors(case, device, is_training)
        forward = lambda: function(*inputs, case.causal)  # noqa: E731
        call = (lambda: train(forward, inputs)) if is_training else forward
        peak = peak_bytes(call, device)
        median = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=seconds).median
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        return Row(case, is_training, name, None, None, None, reason[0] if reason else type(error).__name__)
    return Row(case, is_training, name, 1e3 * median, case.operations(is_training) / median / 1e12, peak / 2**20)


def rows(problems: Sequence[Case], device: str, trains: Sequence[bool], seconds: float) -> Iterator[Row]:
    functions = backends.installed()
    for case, is_training in itertools.product(problems, trains):
        for name, function in functions.items():
            yield measure(name, case, function, device, is_training, seconds)
        array_call = None if is_training else backends.mlx_attention(*tensors(case, "cpu"), case.causal)
        if array_call is not None:
            median = Timer("call()", globals={"call": array_call}).blocked_autorange(min_run_time=seconds).median
            yield Row(case, False, "mlx", 1e3 * median, case.operations(False) / median / 1e12, None)


def speedups(rows: Sequence[Row]) -> dict[Row, float | None]:
    """How many times as fast as sdpa on the same problem."""
    base = {(row.case, row.is_training): row.milliseconds for row in rows if row.backend == "sdpa"}
    found: dict[Row, float | None] = {}
    for row in rows:
        theirs = base.get((row.case, row.is_training))
        found[row] = theirs / row.milliseconds if theirs and row.milliseconds else None
    return found
