"""metal/unit/, the backward pass on M5's matrix unit, in the simulator: the numerics rule, and no race."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import test_backward
import test_dropout
import test_varlen
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from plan_problems import CATALOGUE, METAL
from serving import Packed, packed_problems
from simulator_engine import ROOT
from strategies import TIMES, Problem, problems
from test_block_attention import Blocked, blocked, through_blocks  # noqa: F401 (a fixture)
from test_unit_forward import DTYPES, PROBLEM
from torch import Tensor

import mfa

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

pytestmark = pytest.mark.simulator

# (D, Dv): of a SIMD-group by itself, and of teams that share keys, and maybe queries.
ALONE = ((64, 64), (80, 80))
TEAMS = ((96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (320, 320), (384, 384), (512, 512))
DIMS = (*ALONE, *TEAMS)
LAYOUTS = ("contiguous", "transposed", "one head", "one batch")  # whose rows are aligned


@dataclass(frozen=True)
class Unit(Device):
    """The simulator of an M5, which remembers what ran."""

    name: str = "simulator"
    family: str = "apple10"
    simulations: list[Any] = field(default_factory=list)

    def active(self, seed: int = 0) -> AbstractContextManager[Any]:
        self.simulations.append(super().active(seed))
        return self.simulations[-1]

    def check_kernels(self) -> None:
        """All gradients were those of the unit's kernels."""
        for simulation in self.simulations:
            kernels = [launch.kernel for launch in simulation.launches]
            others = ("forward", "decode", "combine", "backward_delta", "backward_dslopes", "mask_blocks", "tile_map")
            assert all("_unit_" in name or name.startswith(others) for name in kernels)
        self.simulations.clear()


@pytest.fixture
def unit() -> Unit:
    return Unit()


CHANGES: dict[str, dict[str, Any]] = {
    "ragged": {"group": 2, "batch": 2, "seed": 1},
    "causal": {
        **{"query_length": 100, "key_length": 100, "is_causal": True, "seed": 2},
        **{"bias": ("query", (True, False, True, False))},
    },
    "bias": {"bias": ("float32", (True, False, False, True)), "softcap": 4.0, "seed": 2},
    "window": {"alibi": "heads", "has_sinks": True, "window": (30, 9), "key_heads": 2, "seed": 6},
    "half a set": {"head_dim": 80, "value_dim": 80, "group": 2},
    "two": {"head_dim": 128, "value_dim": 128, "window": (30, 9), "key_heads": 2, "seed": 1},
    "two, unlike": {"head_dim": 192, "value_dim": 128, "bias": ("float32", (True, False, False, True)), "seed": 2},
    "three": {"head_dim": 192, "value_dim": 192, "is_causal": True, "alibi": "heads", "seed": 2},
    "four": {
        **{"head_dim": 256, "value_dim": 256, "softcap": 4.0, "seed": 1},
        **{"bias": ("bool", (True, False, True, False))},
    },
    "eight": {"head_dim": 512, "value_dim": 512, "is_causal": True, "has_sinks": True, "seed": 2},
    "flat": {
        "scale": 0.0,
        "query_length": 9,
        "key_length": 55,
    },  # what rounding takes from P is the same for all queries
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quick(unit: Unit, dtype: str, name: str) -> None:
    test_backward.check(replace(PROBLEM, dtype=DTYPES[dtype], **CHANGES[name]), unit)
    unit.check_kernels()


def on_unit(problem: Any) -> Any:
    """The problem, of head dimensions and layouts that the unit's kernels take."""
    head_dim, value_dim = DIMS[problem.seed % len(DIMS)]
    layouts = tuple(layout if layout in LAYOUTS else "contiguous" for layout in problem.layouts)
    return replace(problem, head_dim=head_dim, value_dim=value_dim, layouts=layouts)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(8))
def test_random_problems(unit: Unit, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=40 * TIMES)
    @given(problems(dtypes=tuple(DTYPES.values())).map(on_unit))
    def holds(problem: Problem) -> None:
        test_backward.check(problem, unit)
        unit.check_kernels()

    holds()


@pytest.mark.slow
def test_random_block_masks(unit: Unit, through_blocks: list[tuple[int, int]]) -> None:  # noqa: F811
    @settings(max_examples=40 * TIMES)
    @given(blocked(tuple(DTYPES.values())).map(on_unit))
    def holds(problem: Blocked) -> None:
        through_blocks.append(problem.block)
        test_backward.check(problem, unit)
        unit.check_kernels()

    holds()


@pytest.mark.slow
def test_random_dropout(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_dropout, "active", lambda place: unit.active())

    @settings(max_examples=40 * TIMES)
    @given(problems(dtypes=tuple(DTYPES.values())).map(on_unit), st.sampled_from((0.1, 0.5, 0.9)))
    def holds(problem: Problem, dropout_p: float) -> None:
        test_dropout.check(problem, dropout_p, "apple10")
        unit.check_kernels()

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("uses", ["all keys", "some"])
def test_random_packed_sequences(unit: Unit, uses: str) -> None:
    @settings(max_examples=40 * TIMES)
    @given(packed_problems(dtypes=tuple(DTYPES.values())))
    def holds(problem: Packed) -> None:
        dims = DIMS[problem.seed % len(DIMS)]
        test_varlen.check_gradients(replace(problem, uses=uses, dims=dims), unit)
        unit.check_kernels()

    holds()


def normal(*shape: int, deviation: float = 1) -> Tensor:
    """Of one head; other lengths have other numbers."""
    return deviation * torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(shape[0]))


def count(unit: Unit, query: Tensor, key: Tensor, value_dim: int = 0, **terms: Any) -> dict[str, mfa.Counters]:
    """Counters of backward_dkdv, all launches of it, and of backward_dq."""
    value = normal(key.shape[2], value_dim or key.shape[3]).to(key.dtype)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    with unit.active() as sim:
        out = mfa.attention(query, key, value, **terms)
        out.backward(torch.ones_like(out))
    unit.check_kernels()
    return {
        name: sum((launch.counters for launch in sim.launches if name in launch.kernel), mfa.Counters())
        for name in ("dkdv", "dq")
    }


class Budget(NamedTuple):
    """Of one kernel: members of a team, rows of the other side per block, and, each for D and for Dv, sums over it, and
    how often a block takes own rows and rows of the other side."""

    members: int
    block: int
    sums: tuple[int, int]
    own: tuple[int, int]
    other: tuple[int, int]


def dkdv(members: int, block: int) -> Budget:
    return Budget(members, block, (2, 2), (1, 1), (2, 1))  # dO serves dP and dV


def dq(members: int, block: int) -> Budget:
    return Budget(members, block, (2, 1), (1, 1), (2, 1))


BUDGETS = {
    (64, 64): (dkdv(1, 16), dq(1, 16)._replace(own=(0, 0))),  # holds Q and dO
    (80, 80): (Budget(1, 32, (3, 2), (2, 1), (3, 2)), dq(1, 32)),  # dV and then dK
    (96, 96): (dkdv(2, 32), dq(1, 32)),
    (128, 128): (dkdv(2, 16), dq(1, 16)),
    (192, 128): (dkdv(2, 16), dq(2, 32)),
    (192, 192): (dkdv(3, 16), dq(2, 32)),
    (256, 256): (dkdv(4, 16), dq(2, 16)),
    (320, 320): (dkdv(5, 16), dq(4, 32)),
    (384, 384): (dkdv(6, 16), dq(4, 32)),
    (512, 512): (dkdv(8, 16), dq(4, 16)),
}


@pytest.mark.parametrize("dims", DIMS)
def test_budgets(unit: Unit, dims: tuple[int, int]) -> None:
    """Products exactly, and no operand is read more often than it has to be, whoever of a team has it.

    A SIMD-group by itself meets nobody, and has no threadgroup memory. Of a team each writes its part of S and of dP,
    reads those of the others, and waits once for each.
    """
    query, key = (normal(length, dims[0], deviation=0.1).half() for length in (64, 128))
    counters = count(unit, query, key, dims[1])
    for name, budget, rows, length in zip(("dkdv", "dq"), BUDGETS[dims], (128, 64), (64, 128), strict=True):
        found, tiles, blocks = counters[name], rows // 16, length // budget.block
        loads = [2 * budget.members * math.ceil(dim / budget.members / 32) for dim in dims]  # of 16 rows

        def of(times: tuple[int, int], columns: Sequence[int]) -> int:
            return sum(n * dim for n, dim in zip(times, columns, strict=True))

        assert found.unit_mma == rows * length * of(budget.sums, dims) // 4096
        once = 0 if any(budget.own) else sum(loads)
        per_tile = once + blocks * of(budget.own, loads) + length // 16 * of(budget.other, loads)
        assert found.fragment_loads == 32 * tiles * per_tile
        assert (found.mma, found.shuffles) == (0, 0)
        steps = tiles * blocks * budget.members
        waits = 2 * steps if budget.members > 1 else 0
        assert found.threadgroup_barriers == waits
        assert found.threadgroup_write_bytes == waits * 16 * budget.block * 4
        assert found.threadgroup_read_bytes == found.threadgroup_write_bytes * (budget.members - 1)
        # Of float16: votes on refinement, two where dV is made.
        assert found.reductions == steps * (1 if name == "dq" else budget.sums[0])
        # Fences between loads, which order no memory.
        assert found.simdgroup_barriers == (steps if dims == (64, 64) else 0)


def test_threadgroup_memory() -> None:
    """Of a team two places for each SIMD-group's part: float32 of 16 own rows and a block."""
    for row in CATALOGUE.values():
        if row.kind in ("backward_dkdv", "backward_dq") and row.path.startswith("unit"):
            part = 4 * 16 * row.block
            assert row.threadgroup_memory == (2 * row.simdgroups * part if row.path == "unit_team" else 0)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_that_nothing_is_seen_of_cost_nothing(unit: Unit, dim: int) -> None:
    query, key = (torch.randn(1, 1, 256, dim).mul(0.1).bfloat16() for _ in range(2))
    half, stripes = ((torch.arange(256) // size % 2 > 0).expand(256, 256) for size in (128, 16))
    causal = sum(i + 1 for i in range(16)) / 16**2
    for terms, share in (({"attn_mask": half}, 0.5), ({"attn_mask": stripes}, 0.5), ({"is_causal": True}, causal)):
        counters = count(unit, query, key, **terms)
        for name, products in (("dkdv", 4), ("dq", 3)):
            assert counters[name].unit_mma == products * share * 256 * 256 * dim / 4096


def test_teams_without_rows_make_no_products(unit: Unit) -> None:
    """Of 32 keys, or 64 queries, of a threadgroup."""
    counters = count(unit, normal(16, 256).bfloat16(), normal(16, 256).bfloat16())
    assert (counters["dkdv"].unit_mma, counters["dq"].unit_mma) == (4 * 16, 3 * 16)


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_probabilities_are_refined(unit: Unit, dtype: str, dim: int) -> None:
    """Of float16, in blocks where a P is more than a 16th: dV, dK and dQ then take another product."""
    extra, product = dtype == "f16", dim // 16  # of 16 rows and 16 columns
    for keys, is_large in ((15, True), (17, False)):
        query, key = normal(16, dim, deviation=0.01), normal(keys, dim)  # P is 1 / keys, nearly
        counters = count(unit, query.to(DTYPES[dtype]), key.to(DTYPES[dtype]))
        tiles = -(-keys // 16)
        blocks = 2 if dim == 192 else tiles  # of backward_dq, which there has 32 keys per block
        assert counters["dkdv"].unit_mma == tiles * product * (6 if extra and is_large else 4)
        assert counters["dq"].unit_mma == blocks * product * (4 if extra and is_large else 3)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_probabilities_are_refined(unit: Unit, dtype: str, dim: int) -> None:
    """Of float16, for dK and dV: else what rounding takes from one and the same P would add up."""
    product = dim // 16
    for deviation, is_flat in ((0.0, True), (1e-4, True), (0.01, False)):
        query, key = normal(16, dim, deviation=deviation), normal(32, dim)
        counters = count(unit, query.to(DTYPES[dtype]), key.to(DTYPES[dtype]))
        assert counters["dkdv"].unit_mma == 2 * product * (6 if is_flat and dtype == "f16" else 4)
        assert counters["dq"].unit_mma == 2 * product * 3


# Of a lane, per block: additions and multiplications (fused ones are one), loads, products, exponentials; registers of
# data, of which 128 less about 14 for addresses and counters are there. Loads that a hand count gives are those of
# test_budgets, and the statistics of four or eight queries: of a team, lse and delta by themselves, and the parts of
# others. It adds those up as well, and stores its own.
BOTH = ("wants_grad_key", "wants_grad_value")
OPEN_BLOCKS = {
    "BACKWARD_DKDV(f16, unit, 64, 64, 4, 2, 16)": (BOTH, 24, 25, 16, 8, 102),
    "BACKWARD_DKDV(f16, unit, 80, 80, 4, 2, 32)": (BOTH[:1], 48, 56, 30, 16, 116),
    "BACKWARD_DKDV(f16, unit, 128, 128, 4, 2, 16)": (BOTH[:1], 24, 44, 24, 8, 106),
    "BACKWARD_DKDV(f16, unit_team, 96, 96, 8, 2, 32)": (BOTH, 80, 57, 24, 16, 112),
    "BACKWARD_DKDV(f16, unit_team, 128, 128, 8, 2, 16)": (BOTH, 40, 33, 16, 8, 96),
    "BACKWARD_DKDV(f16, unit_team, 192, 128, 8, 2, 16)": (BOTH, 40, 39, 20, 8, 112),
    "BACKWARD_DKDV(f16, unit_team, 192, 192, 12, 2, 16)": (BOTH, 56, 37, 16, 8, 96),
    "BACKWARD_DKDV(f16, unit_team, 256, 256, 8, 2, 16)": (BOTH, 72, 41, 16, 8, 96),
    "BACKWARD_DKDV(f16, unit_team, 320, 320, 10, 2, 16)": (BOTH, 88, 45, 16, 8, 96),
    "BACKWARD_DKDV(f16, unit_team, 512, 512, 8, 2, 16)": (BOTH, 136, 57, 16, 8, 96),
    "BACKWARD_DQ(f16, unit, held, 64, 64, 4, 2, 16)": ((), 24, 13, 12, 8, 96),
    "BACKWARD_DQ(f16, unit, reread, 128, 128, 4, 2, 16)": ((), 24, 40, 24, 8, 104),
    "BACKWARD_DQ(f16, unit_team, reread, 192, 192, 8, 2, 32)": ((), 80, 57, 36, 16, 108),
    "BACKWARD_DQ(f16, unit_team, reread, 256, 256, 8, 2, 16)": ((), 40, 45, 24, 8, 100),
}


@pytest.mark.parametrize("row", OPEN_BLOCKS)
def test_instructions_of_an_open_block(row: str) -> None:
    """In a kernel with a window as well: an open block has no code for it, nor for rows that are not there."""
    wants, operations, loads, products, exponentials, registers = OPEN_BLOCKS[row]
    header = "dkdv" if "DKDV" in row else "dq"
    source = f'#include "unit/backward_{header}_team.h"\nnamespace mfa {{\n{row}\n}}\n'
    true = ["is_aligned", "is_exact_head", "has_window", *wants]
    function = instructions.kernel_of(instructions.emit(source, [METAL], true, standard="metal4.0"))
    step = instructions.step_of(function)
    blocks = instructions.usual_blocks(function, *instructions.main_loop(function))
    usual = [(i, times) for name, times in blocks.items() for i in function.blocks[name]]
    sums = [(i, times) for i, times in usual if i.opcode in ("fadd", "fsub", "fmul") or "@llvm.fma." in i.text]
    assert sum(times * instructions.classify(i)[1] for i, times in sums) <= operations
    counts = step.counts
    assert counts["load"] <= loads
    assert (counts["unit_mma"], counts["exp"], counts["shuffle"]) == (products, exponentials, 0)
    assert counts["conversion"] == counts["move"] == 0
    parts = 2 * exponentials // 4 if "team" in row else 0  # of S and of dP, four scores at a time
    assert counts["store"] == parts
    assert step.registers <= registers
