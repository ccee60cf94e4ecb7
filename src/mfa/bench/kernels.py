"""What kernels do per step of their main loop: the tables that the cost model works from.

Counted, not estimated: see tests/count_kernels.py, which writes kernels.csv, and test_cost_model.py, which counts anew.
Registers and what goes to the stack are a compiler's (registers.py); of kernels that it has not seen, an estimate.
"""

import csv
import hashlib
import statistics
from pathlib import Path
from typing import NamedTuple

from . import registers

PATH = Path(__file__).with_name("kernels.csv")


class Kernel(NamedTuple):
    """A kernel with its function constants set for a plain problem. A step is one block of the other side's rows."""

    name: str
    kind: str  # forward | decode | backward_dkdv | backward_dq | backward_dq_from_ds | backward_dbias
    dtype: str
    head_dim: int
    path: str  # staged | direct | team | unit | unit_team
    simdgroups: int  # per threadgroup
    rows: int  # that a threadgroup owns
    block: int  # rows of the other side per step
    threadgroup_memory: int  # bytes
    data_registers: int  # 32-bit, per lane: the most data that is alive at once
    exceptions: int  # instructions of a step that only some steps run: masks, rescales
    # Instructions per SIMD-group and step.
    mma: int  # both operands of 16 bits
    mixed_mma: int
    wide_mma: int  # both of 32 bits
    unit_mma: int  # of 16x16x16, on the matrix unit
    arithmetic: int  # of floats, comparisons and selections too
    integer: int
    conversion: int
    move: int  # of elements that an operand takes from two places
    load: int
    store: int
    exp: int
    shuffle: int
    reduce: int
    barrier: int
    fence: int  # SIMD-group barriers
    # Bytes per threadgroup and step.
    threadgroup_read: int
    threadgroup_write: int
    device_read: int
    device_write: int
    # Bytes per threadgroup, besides.
    tile_device_read: int
    tile_device_write: int
    # How many times bank conflicts multiply the clocks of stores to threadgroup memory. Loads have none, see
    # test_cost_model.py.
    store_conflict: float

    # Of the compiler; not in kernels.csv.
    registers: int = 0  # 32-bit, per lane, before anything is spilled
    stack: int = 0  # loads and stores per SIMD-group and step
    stack_bytes: int = 0  # that those move, per lane

    @property
    def sharers(self) -> int:
        """SIMD-groups that have the same rows: a team's, see metal/team.h, metal/backward_team.h and metal/unit/."""
        if self.path == "unit_team":
            return 16 * self.simdgroups // self.rows
        if self.path != "team":
            return 1
        return self.simdgroups if self.kind.startswith("backward") else 4

    @property
    def products(self) -> int:
        """8x8x8 MMAs per SIMD-group and step, or what is as much of the matrix unit's."""
        return self.mma + self.mixed_mma + self.wide_mma + 8 * self.unit_mma

    @property
    def counted(self) -> str:
        """All that is counted of it, in short: of two kernels that do the same, the same."""
        return hashlib.sha256(repr(self[: len(COUNTED)]).encode()).hexdigest()[:16]


COUNTED = tuple(field for field in Kernel._fields if field not in Kernel._field_defaults)


def counted(path: Path = PATH) -> dict[str, Kernel]:
    """By name, as counted: without registers."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            Kernel(*(Kernel.__annotations__[name](text) for name, text in row.items())) for row in csv.DictReader(file)
        ]
    return {kernel.name: kernel for kernel in rows}


def load(path: Path = PATH) -> dict[str, Kernel]:
    """By name: ours of every dtype, and MLX's."""
    kernels, compiled, on_unit = counted(path), registers.of_kernels(), registers.on_unit()
    besides: dict[tuple[str, str], list[int]] = {}  # what addresses and counters take
    for name in kernels.keys() & compiled.keys():
        kernel = kernels[name]
        more = compiled[name].registers - kernel.data_registers
        besides.setdefault((kernel.kind, kernel.path), []).append(more)

    def complete(kernel: Kernel) -> Kernel:
        if own := compiled.get(kernel.name):
            return kernel._replace(registers=own.registers, stack=own.stack, stack_bytes=own.stack_bytes)
        theirs = on_unit.get(kernel.name)
        if theirs is not None and theirs.counted == kernel.counted:
            stack, stack_bytes = registers.stack_of(theirs.spill_bytes)
            return kernel._replace(registers=theirs.registers, stack=stack, stack_bytes=stack_bytes)
        # Those for the matrix unit keep their addresses as direct ones do.
        like = ("forward", "direct") if kernel.unit_mma else (kernel.kind, kernel.path)
        estimate = kernel.data_registers + statistics.median_low(besides[like])
        return kernel._replace(registers=min(registers.MOST, estimate))

    return {name: complete(kernel) for name, kernel in kernels.items()}


def of_float16(path: Path = PATH) -> dict[str, Kernel]:
    """Those that the model's problems run, and MLX's of every dtype, whose timings are published."""
    return {name: kernel for name, kernel in load(path).items() if kernel.dtype == "f16" or name.startswith("steel")}
