"""What kernels do per step of their main loop: the table that the cost model works from.

Counted, not estimated: see tests/count_kernels.py, which writes it, and test_cost_model.py, which counts anew.
"""

import csv
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("kernels.csv")


class Kernel(NamedTuple):
    """A kernel with its function constants set for a plain problem. A step is one block of the other side's rows."""

    name: str
    kind: str  # forward | decode | backward_dkdv | backward_dq | backward_dq_from_ds
    dtype: str
    head_dim: int
    path: str  # staged | direct
    simdgroups: int  # per threadgroup
    rows: int  # that a threadgroup owns
    block: int  # rows of the other side per step
    threadgroup_memory: int  # bytes
    registers: int  # 32-bit, per lane; an estimate
    exceptions: int  # instructions of a step that only some steps run: masks, rescales
    # Instructions per SIMD-group and step.
    mma: int  # both operands of 16 bits
    mixed_mma: int
    wide_mma: int  # both of 32 bits
    arithmetic: int  # of floats, comparisons and selections too
    integer: int
    conversion: int
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
    # How many times bank conflicts multiply the clocks of loads from threadgroup memory, and of stores to it.
    load_conflict: float
    store_conflict: float

    @property
    def products(self) -> int:
        """8x8x8 MMAs per SIMD-group and step."""
        return self.mma + self.mixed_mma + self.wide_mma


def load(path: Path = PATH) -> dict[str, Kernel]:
    """Kernels by name."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            Kernel(*(Kernel.__annotations__[name](text) for name, text in row.items())) for row in csv.DictReader(file)
        ]
    return {kernel.name: kernel for kernel in rows}
