"""The simulator's checks, proved on our own kernels: each mutant breaks one rule, and each is caught.

A mutant is a patched copy of metal/, built with the instances that the problems below run in.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator_engine import build_kernels

import mfa
from mfa import _library

pytestmark = pytest.mark.simulator

METAL = Path(__file__).parent.parent / "metal"
SOURCE = """
#include "append.h"
#include "decode.h"
#include "forward.h"
namespace mfa {
FORWARD(f16, staged, split, 64, 64, 8, 2, 32)
FORWARD(f16, staged, shared, 256, 256, 4, 1, 16)
FORWARD(f16, direct, split, 64, 64, 4, 2, 32)
DECODE(f16, direct, 64, 64, 1, 1, 32)
DECODE(f16, staged, 64, 64, 8, 1, 32)
APPEND(f16, 4)
}
"""


@dataclass
class Mutant:
    name: str
    file: str
    old: str
    new: str
    finding: str  # a regular expression for the message
    problem: dict = field(default_factory=dict)
    occurrence: int = 0  # which of several equal places


FIRST = "    if (!is_first) {\n      threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n"
SECOND = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (sees) {"
SHARED = "      threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SHARES = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (rows.view.sees("
D256: dict[str, Any] = {"dim": 256, "lengths": (40, 40), "kernel": "forward_f16_d256_v256_staged_s4_r1_k16"}
DECODE: dict[str, Any] = {"lengths": (40, 77), "kernel": "decode_f16_d64_v64_staged_s8_r1_k32"}
FEW: dict[str, Any] = {"lengths": (2, 77), "kernel": "decode_f16_d64_v64_direct_s1_r1_k32"}
ODD: dict[str, Any] = {"dim": 61}
APPEND: dict[str, Any] = {"dim": 61, "lengths": (3, 9), "appends": True}
DIRECT = {"family": "apple9", "kernel": "forward_f16_d64_v64_direct_s4_r2_k32"}
UNCHECKED: dict[str, Any] = {"checks": ()}  # divergence is always found, but races would be found first

MUTANTS = [
    Mutant("first barrier deleted", "forward.h", FIRST, "", "race"),
    Mutant("second barrier deleted", "forward.h", SECOND, "    if (sees) {", "race"),
    Mutant("third barrier deleted", "forward.h", SHARED, "", "race", D256, 1),
    Mutant("fourth barrier deleted", "forward.h", SHARED, "", "race", D256, 2),
    Mutant("first barrier orders nothing", "forward.h", FIRST, FIRST.replace("mem_threadgroup", "mem_none"), "race"),
    Mutant(
        "second barrier orders device memory",
        "forward.h",
        SECOND,
        SECOND.replace("mem_threadgroup", "mem_device"),
        "race",
    ),
    Mutant(
        "barrier in half the lanes",
        "forward.h",
        SECOND,
        "    if (lane_index < 16)\n  " + SECOND,
        "divergent",
        UNCHECKED,
    ),
    Mutant(
        "barrier in one SIMD-group", "forward.h", SECOND, "    if (simdgroup == 0)\n  " + SECOND, "barrier", UNCHECKED
    ),
    Mutant(
        "a lane misses a shuffle",
        "forward_rows.h",
        "const float candidate = row_max(largest_score(r)) * scale;",
        "const float largest = largest_score(r);\n"
        "      const float candidate = (lane.row == 5 && lane.column == 2 ? largest : row_max(largest)) * scale;",
        "divergent",
    ),
    Mutant(
        "early return before a barrier",
        "forward.h",
        "  const View view = view_of_queries(params, tile.sequence",
        "  if (rows.first_row >= params.query_length) return;\n"
        "  const View view = view_of_queries(params, tile.sequence",
        "barrier|missing",
    ),
    Mutant(
        "threadgroup array too short",
        "forward.h",
        "sizeof(T)) /\n             16];",
        "sizeof(T)) /\n             16 - 8];",
        "out of bounds",
    ),
    Mutant(
        "no guard for the last keys of V", "loader.h", "is_aligned && is_valid &&", "is_aligned &&", "out of bounds"
    ),
    Mutant(
        "no guard for the last keys of K", "staged.h", "is_aligned && is_valid &&", "is_aligned &&", "out of bounds"
    ),
    Mutant(
        "no guard for the last key of a pair",
        "staged.h",
        "row + 1 < valid, d, share.dim",
        "row < valid, d, share.dim",
        "out of bounds",
    ),
    Mutant(
        "no guard for the head dimension of V",
        "loader.h",
        "is_valid && d + e < dim ? source",
        "is_valid ? source",
        "out of bounds",
        ODD,
    ),
    Mutant(
        "no guard for the head dimension of K",
        "staged.h",
        "is_valid && d + e < dim ? source",
        "is_valid ? source",
        "out of bounds",
        ODD,
    ),
    Mutant(
        "the last pair of K is not copied",
        "staged.h",
        "row < kRows; row += Shared::kStep",
        "row < kRows - 2; row += Shared::kStep",
        "uninitialised",
        {"checks": ("uninitialised",)},
        1,
    ),
    Mutant(
        "no guard for the last queries",
        "loader.h",
        "is_aligned && row < valid && d + 8 <= dim",
        "is_aligned",
        "out of bounds",
    ),
    Mutant(
        "direct: reads past the last keys",
        "device_rows.h",
        "min(int(row), last - tile * kFragment)",
        "int(row)",
        "out of bounds",
        DIRECT,
    ),
    Mutant("output store unguarded", "tile.h", "if (row < length) {", "if (true) {", "out of bounds|race"),
    Mutant("output store ignores Dv", "loader.h", "if (d + 4 + e < dim) {", "if (true) {", "out of bounds|race", ODD),
    Mutant(
        "lse store unguarded",
        "forward_rows.h",
        "lane.column == 0 && i < sequence.query_length",
        "lane.column == 0",
        "out of bounds|race",
    ),
    Mutant(
        "every tile writes the first rows", "forward.h", "first_row(tile.index * block_queries)", "first_row(0)", "race"
    ),
    Mutant("decode: first barrier deleted", "decode.h", FIRST, "", "race", DECODE),
    Mutant("decode: second barrier deleted", "decode.h", SHARES, "    if (rows.view.sees(", "race", DECODE),
    Mutant(
        "decode: no guard for the last keys",
        "cache.h",
        "is_valid = first_key + row < cache.length",
        "is_valid = true",
        "out of bounds",
        DECODE,
    ),
    Mutant(
        "decode: direct: reads past the last keys",
        "device_rows.h",
        "min(int(row), last - tile * kFragment)",
        "int(row)",
        "out of bounds",
        FEW,
    ),
    Mutant(
        "decode: output store unguarded",
        "decode.h",
        "if (row < tile.row_count) {",
        "if (true) {",
        "out of bounds|race",
        DECODE,
    ),
    Mutant(
        "append: rows unguarded", "append.h", "if (index >= 2 * rows) {", "if (false) {", "out of bounds|race", APPEND
    ),
    Mutant(
        "append: every SIMD-group has the first row",
        "append.h",
        "long(position.x) * kSimdgroups + simdgroup",
        "long(position.x) * kSimdgroups",
        "race",
        APPEND,
    ),
    Mutant(
        "append: pairs reach beyond R",
        "rotary.h",
        "if (d + e < 2 * pairs) {",
        "if (d + e < dim) {",
        "out of bounds",
        APPEND,
    ),
    Mutant(
        "append: no guard for the head dimension",
        "loader.h",
        "    if (d + e < dim) {\n      row[d + e] = y[e];",
        "    if (true) {\n      row[d + e] = y[e];",
        "out of bounds|race",
        APPEND,
    ),
    Mutant(
        "tails are not zeroed",
        "loader.h",
        "target[e] = is_valid && d + e < dim ? source[e] : T(0);",
        "if (is_valid && d + e < dim) target[e] = source[e];",
        "uninitialised",
        ODD | {"checks": ("uninitialised",)},
    ),
]


def patched(mutant: Mutant, directory: Path) -> Path:
    shutil.copytree(METAL, directory)
    file = directory / mutant.file
    pieces = file.read_text().split(mutant.old)
    assert len(pieces) > 1, f"{mutant.name}: {mutant.file} no longer holds the text that this mutant changes"
    at = mutant.occurrence + 1
    file.write_text(mutant.old.join(pieces[:at]) + mutant.new + mutant.old.join(pieces[at:]))
    return directory


def build(metal: Path) -> Path:
    source = metal / "mutant.metal"
    source.write_text(SOURCE)
    return build_kernels([source], metal / "mutant.so", include_dirs=[metal])


def run(
    library: Path,
    seed: int,
    *,
    dim: int = 64,
    lengths: tuple[int, int] = (150, 77),
    family: str = "apple7",
    appends: bool = False,
    kernel: str | None = None,  # instead of the one that tuning.def chooses
    checks: tuple[str, ...] = ("races", "bounds"),  # what is uninitialised would often be found first
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, 2, length, dim, generator=generator).half() for length in (lengths[0], lengths[1], lengths[1])
    )
    _library.prefer_instance(kernel)
    try:
        with mfa.simulate(family, checks=checks, seed=seed, kernel_library=library):
            if appends:
                caches, tables = torch.zeros(2, 1, 2, 20, dim).half(), torch.zeros(2, 30, dim // 4)
                lengths_before = torch.tensor([9], dtype=torch.int32)
                return torch.ops.mfa.attention_append(
                    *(query, *caches, key, value, lengths_before, 0, None, None, None, *tables, None, False, True)
                )[0]
            return mfa.attention(query, key, value, return_lse=True)[0]
    finally:
        _library.prefer_instance(None)


def each_mutant() -> list[Any]:
    """Every third is in the unmarked suite."""
    return [
        pytest.param(mutant, id=mutant.name.replace(" ", "-"), marks=[pytest.mark.slow] if number % 3 else [])
        for number, mutant in enumerate(MUTANTS)
    ]


@pytest.mark.parametrize("mutant", each_mutant())
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    library = build(patched(mutant, tmp_path / "metal"))
    with pytest.raises(mfa.SimulationError, match=mutant.finding):
        run(library, 1, **mutant.problem)


def test_the_original_is_clean(tmp_path: Path) -> None:
    library = build(Path(shutil.copytree(METAL, tmp_path / "metal")))
    for seed in range(3):
        for problem in ({}, D256, ODD, DIRECT, DECODE, FEW, APPEND):
            run(library, seed, checks=("races", "bounds", "uninitialised"), **problem)


def test_a_forgotten_accumulator_is_seen(tmp_path: Path) -> None:
    """Registers have no shadow, so every variable starts as NaN."""
    mutant = Mutant("accumulator not cleared", "products.h", "  clear(result);\n", "", "")
    assert run(build(patched(mutant, tmp_path / "metal")), 1).isnan().any()
