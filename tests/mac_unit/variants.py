"""Forward kernels of the matrix unit that mfa doesn't ship, one decision changed in each: what they gain, a Mac says.

A variant that wins becomes a row of metal/unit/instances.def, or a line of the header that its patch is of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from encoding import encode
from gpu_check.plans import CONSTANTS, enumerators

from mfa import _native

from .build import METAL, Patch, metallib, patched
from .metal import Buffer, Device, Launch, Pipeline

ARGUMENTS = enumerators("Argument")
DTYPES = ("f16", "bf16")


class Row(NamedTuple):
    """Of FORWARD in metal/unit/instances.def, for a SIMD-group by itself."""

    dtype: str
    path: str
    memory: str  # split: Q is held in registers; shared: it is read again for every block
    head_dim: int
    value_dim: int
    simdgroups: int
    row_tiles: int
    block: int  # keys per step

    @property
    def kernel(self) -> str:
        dims = f"d{self.head_dim}_v{self.value_dim}"
        return f"forward_{self.dtype}_{dims}_{self.path}_s{self.simdgroups}_r{self.row_tiles}_k{self.block}"

    @property
    def rows(self) -> int:
        """Queries of a threadgroup."""
        return 8 * self.row_tiles * self.simdgroups

    @property
    def tuning(self) -> str:
        """Its row in tuning.def."""
        own = f"{self.dtype}, {self.head_dim}, {self.value_dim}, {self.path}"
        return f"TUNE_FORWARD(apple10, {own}, {self.simdgroups}, {self.row_tiles}, {self.block})"

    def __str__(self) -> str:
        return f"FORWARD({', '.join(map(str, self))})"


@cache
def rows_of_instances() -> dict[str, Row]:
    """By kernel."""
    text = (METAL / "unit" / "instances.def").read_text(encoding="utf-8")
    found = {}
    for dtype, memory, *numbers in re.findall(
        r"^FORWARD\((\w+), unit, (\w+), (\d+), (\d+), (\d+), (\d+), (\d+)\)", text, re.MULTILINE
    ):
        row = Row(dtype, "unit", memory, *map(int, numbers))
        found[row.kernel] = row
    return found


class Problem(NamedTuple):
    heads: int
    length: int

    def operations(self, row: Row) -> int:
        return 2 * self.heads * self.length**2 * (row.head_dim + row.value_dim)

    def plan(self, dtype: str, head_dim: int, value_dim: int) -> Any:
        """Dense."""
        return _native.plan(
            family="apple10",
            dtype=dtype,
            query_heads=self.heads,
            key_heads=self.heads,
            query_length=self.length,
            key_length=self.length,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=1 / math.sqrt(head_dim),
        )


def shipped(dtype: str, head_dim: int) -> Row:
    """What tuning.def chooses."""
    (launch,) = Problem(1, 256).plan(dtype, head_dim, head_dim).launches
    return rows_of_instances()[launch.kernel]


class Variant(NamedTuple):
    question: str
    name: str
    row: Row
    patches: tuple[Patch, ...] = ()
    means: str = ""  # what changes in mfa if it is faster: a row of tuning.def or instances.def, or a header's line

    @property
    def base(self) -> Row:
        """What it is a variant of."""
        return shipped(self.row.dtype, self.row.head_dim)


def _before_values(statement: str) -> tuple[Patch, ...]:
    call = "  multiply_accumulate<T, kValueDim>(rows.out, rows.score,"
    return (Patch("unit/forward.h", call, f"  {statement};\n{call}"),)


def _refines(text: str) -> tuple[Patch, ...]:
    return (Patch("unit/forward_rows.h", "return sums_score_gradient || (exceeds && has_large());", f"return {text};"),)


SETS = "kDim >= 4 * kSetWidth ? 2 : 1"
CUT = (Patch("unit/products.h", "as_type<float>(as_type<uint>(x) + 0x1000u)", "x"),)


def variants() -> Iterator[Variant]:
    """In the order of the questions."""
    for dtype in DTYPES:
        of = {dim: shipped(dtype, dim) for dim in (64, 80, 96, 128)}
        for dim in (64, 80, 96):
            other = {"split": "shared", "shared": "split"}[of[dim].memory]
            words = {"split": "Q held in registers", "shared": "Q read again for every block"}[other]
            row = of[dim]._replace(memory=other)
            yield Variant("queries", f"D {dim}, {words}", row, (), str(row))
        for dim, steps in ((96, 3), (128, 1), (128, 4)):
            patch = Patch("unit/products.h", SETS, str(steps))
            means = f"kSetsPerStep of D {dim} in metal/unit/products.h"
            yield Variant("unroll", f"D {dim}, {steps} sets per step", of[dim], (patch,), means)
        for dim in (64, 128):
            for scope in ("simdgroup", "threadgroup"):
                patches = _before_values(f"{scope}_barrier(mem_flags::mem_none)")
                means = f"a {scope} barrier that orders nothing, before P V in metal/unit/forward.h"
                yield Variant("barrier", f"D {dim}, {scope} barrier", of[dim], patches, means)
        for dim, block in ((64, 64), (80, 64), (96, 64), (128, 16)):
            row = of[dim]._replace(block=block)
            yield Variant("block", f"D {dim}, {block} keys per step", row, (), row.tuning)
        for dim in (64, 128):
            row = of[dim]._replace(simdgroups=8)
            yield Variant("simdgroups", f"D {dim}, 8 SIMD-groups", row, (), row.tuning)
        for dim in (64, 128):
            yield Variant("rounding", f"D {dim}, P cut", of[dim], CUT)
            if dtype == "f16":
                yield Variant("rounding", f"D {dim}, never refined", of[dim], _refines("false"))
                yield Variant("rounding", f"D {dim}, always refined", of[dim], _refines("true"))


def of_question(question: str) -> list[Variant]:
    return [variant for variant in variants() if variant.question == question]


def source(row: Row) -> str:
    return f'#include "unit/forward.h"\nnamespace mfa {{\n{row}\n}}\n'


def compiled(folder: Path, row: Row, patches: tuple[Patch, ...] = ()) -> Path:
    """A metallib with this kernel alone, in a new folder."""
    folder.mkdir(parents=True)
    file = folder / "kernel.metal"
    file.write_text(source(row), encoding="utf-8")
    return metallib(file, patched(folder, patches) if patches else METAL)


def constants_of(launch: Any) -> dict[int, bool]:
    """All there are, by index."""
    return {index: launch.constants.get(name, False) for name, index in CONSTANTS.items()}


class Attention:
    """Dense attention of a problem by whatever kernel; inputs are the same for all of a dtype and D."""

    def __init__(self, device: Device, problem: Problem, dtype: str, head_dim: int) -> None:
        generator = np.random.default_rng(0)
        shape = (problem.heads, problem.length, head_dim)
        self.inputs = [encode(generator.standard_normal(shape, np.float32), dtype) for _ in range(3)]
        self._buffers = [device.buffer(array) for array in self.inputs]
        self._device, self._problem = device, problem
        self._plan = problem.plan(dtype, head_dim, head_dim)

    def constants(self) -> dict[int, bool]:
        return constants_of(self._plan.launches[0])

    def launch(self, pipeline: Pipeline, row: Row) -> Launch:
        """Into an output of its own, the argument `out`."""
        out = self._device.buffer(np.zeros_like(self.inputs[0]))
        lse = self._device.buffer(np.zeros(self.inputs[0].shape[:2], np.float32))
        tensors = zip(("query", "key", "value", "out", "lse"), (*self._buffers, out, lse), strict=True)
        arguments: dict[int, Buffer | bytes] = {ARGUMENTS[name]: buffer for name, buffer in tensors}
        arguments[ARGUMENTS["params"]] = bytes(self._plan.params)
        grid = (self._problem.heads, -(-self._problem.length // row.rows), 1)
        return Launch(pipeline, grid, (32 * row.simdgroups, 1, 1), arguments)


def out_of(launch: Launch) -> np.ndarray:
    buffer = launch.arguments[ARGUMENTS["out"]]
    assert not isinstance(buffer, bytes)
    return buffer.read()
