"""Counts what attention does, in the simulator, where there is no GPU to time it."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import attention, simulate
from .cases import Case, tensors
from .timed import train


class Row(NamedTuple):
    """Of all launches of a call. MMAs and barriers count once per SIMD-group, exp2 once per lane."""

    case: Case
    is_training: bool
    kernels: str
    mma: int  # 8x8x8
    exp2: int
    barriers: int  # of threadgroups
    threadgroup_bytes: int  # read and written
    device_read_bytes: int
    device_write_bytes: int

    def __str__(self) -> str:
        mode = "training" if self.is_training else "forward"
        return (
            f"{self.case!s:40} {mode:9}{self.mma:>12,} MMAs{self.exp2:>12,} exp2{self.barriers:>9,} barriers"
            f"{self.threadgroup_bytes:>15,} B threadgroup{self.device_read_bytes:>13,} B read"
            f"{self.device_write_bytes:>12,} B written"
        )


def rows(problems: Sequence[Case], family: str, trains: Sequence[bool]) -> Iterator[Row]:
    for case, is_training in itertools.product(problems, trains):
        inputs = tensors(case, "cpu", is_training)
        forward = functools.partial(attention, *inputs, is_causal=case.causal)
        with simulate(family) as sim:
            if is_training:
                train(forward, inputs)
            else:
                forward()
        counters = sim.counters
        yield Row(
            case,
            is_training,
            " ".join(launch.kernel for launch in sim.launches),
            counters.mma,
            counters.exp,
            counters.threadgroup_barriers,
            counters.threadgroup_read_bytes + counters.threadgroup_write_bytes,
            counters.device_read_bytes,
            counters.device_write_bytes,
        )
