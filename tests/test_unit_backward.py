"""metal/unit/, the backward pass on M5's matrix unit, in the simulator: the numerics rule, and no race."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import test_backward
import test_dropout
import test_varlen
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from plan_problems import METAL
from serving import Packed, packed_problems
from simulator_engine import ROOT
from strategies import TIMES, Problem, problems
from test_block_attention import Blocked, blocked, through_blocks  # noqa: F401 (a fixture)
from torch import Tensor

import mfa

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

pytestmark = pytest.mark.simulator

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
DIMS = (64, 80, 96, 128)
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


USUAL = {"layouts": ("contiguous",) * 3, "window": (None, None), "is_causal": False, "scale": None}
PROBLEM = Problem(torch.float16, 1, 1, 1, 77, 131, 64, 64, **USUAL)
CHANGES: dict[str, dict[str, Any]] = {
    "ragged": {"group": 2, "batch": 2, "seed": 1},
    "causal": {
        **{"query_length": 100, "key_length": 100, "is_causal": True, "seed": 2},
        **{"bias": ("query", (True, False, True, False))},
    },
    "bias": {"bias": ("float32", (True, False, False, True)), "softcap": 4.0, "seed": 2},
    "window": {"alibi": "heads", "has_sinks": True, "window": (30, 9), "key_heads": 2, "seed": 6},
    "half a set": {"head_dim": 80, "value_dim": 80, "group": 2},
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
    """The problem, of a head dimension and layouts that the unit's kernels take."""
    dim = DIMS[problem.seed % len(DIMS)]
    layouts = tuple(layout if layout in LAYOUTS else "contiguous" for layout in problem.layouts)
    return replace(problem, head_dim=dim, value_dim=dim, layouts=layouts)


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
        dim = DIMS[problem.seed % len(DIMS)]
        test_varlen.check_gradients(replace(problem, uses=uses, dims=(dim, dim)), unit)
        unit.check_kernels()

    holds()


def count(unit: Unit, query: Tensor, key: Tensor, **terms: Any) -> dict[str, mfa.Counters]:
    """Counters of backward_dkdv, all launches of it, and of backward_dq."""
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(1)).to(key.dtype)
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


@pytest.mark.parametrize("dim", [64, 128])
def test_budgets(unit: Unit, dim: int) -> None:
    """Products exactly, no operand read more often than it has to be, no threadgroup memory and no wait.

    A block is of 16 queries and 16 keys; a set of 32 columns of its rows are two loads. dK and dV of D 64 take five
    sets: K, V, dO, and Q twice; at D 128 they are two launches, and K, Q and dO are read for both. dQ takes K twice and
    V, and at D 128 Q and dO, which D 64 holds.
    """
    query, key = (torch.randn(1, 1, length, dim).mul(0.1).half() for length in (64, 128))
    product, sets, blocks = 64 * 128 * dim // 4096, dim // 32, 64 // 16 * 128 // 16
    counters = count(unit, query, key)
    dkdv, dq = counters["dkdv"], counters["dq"]
    assert (dkdv.unit_mma, dq.unit_mma) == (product * (4 if dim == 64 else 5), product * 3)
    dkdv_loads, dq_loads, held = (5, 3, 2) if dim == 64 else (8, 5, 0)
    assert dkdv.fragment_loads == 32 * blocks * 2 * sets * dkdv_loads
    assert dq.fragment_loads == 32 * 2 * sets * (blocks * dq_loads + 64 // 16 * held)
    for found in (dkdv, dq):
        assert (found.mma, found.shuffles, found.threadgroup_barriers) == (0, 0, 0)
        assert found.threadgroup_reads == found.threadgroup_writes == 0
    # Of float16: votes on refinement, two where dV is made.
    assert (dkdv.reductions, dq.reductions) == (blocks * (2 if dim == 64 else 3), blocks)
    # Fences between loads, which order no memory.
    assert dkdv.simdgroup_barriers == dq.simdgroup_barriers == (blocks if dim == 64 else 0)


def test_blocks_that_nothing_is_seen_of_cost_nothing(unit: Unit) -> None:
    query, key = (torch.randn(1, 1, 256, 64).mul(0.1).bfloat16() for _ in range(2))
    mask = (torch.arange(256) >= 128).expand(256, 256)
    causal = sum(i + 1 for i in range(16)) / 16**2
    for terms, share in (({"attn_mask": mask}, 0.5), ({"is_causal": True}, causal)):
        counters = count(unit, query, key, **terms)
        for name, products in (("dkdv", 4), ("dq", 3)):
            assert counters[name].unit_mma == products * share * 256 * 256 * 64 / 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_probabilities_are_refined(unit: Unit, dtype: str) -> None:
    """Of float16, in blocks where a P is more than a 16th: dV, dK and dQ then take another product."""
    generator = torch.Generator().manual_seed(1)
    extra = dtype == "f16"
    for keys, is_large in ((15, True), (17, False)):
        query = torch.randn(1, 1, 16, 64, generator=generator) * 0.01  # P is 1 / keys, nearly
        key = torch.randn(1, 1, keys, 64, generator=generator)
        counters = count(unit, query.to(DTYPES[dtype]), key.to(DTYPES[dtype]))
        tiles = -(-keys // 16)
        assert counters["dkdv"].unit_mma == tiles * 4 * (6 if extra and is_large else 4)
        assert counters["dq"].unit_mma == tiles * 4 * (4 if extra and is_large else 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_probabilities_are_refined(unit: Unit, dtype: str) -> None:
    """Of float16, for dK and dV: else what rounding takes from one and the same P would add up."""
    generator = torch.Generator().manual_seed(1)
    for deviation, is_flat in ((0.0, True), (1e-4, True), (0.01, False)):
        query = torch.randn(1, 1, 16, 64, generator=generator) * deviation
        key = torch.randn(1, 1, 32, 64, generator=generator)
        counters = count(unit, query.to(DTYPES[dtype]), key.to(DTYPES[dtype]))
        assert counters["dkdv"].unit_mma == 2 * 4 * (6 if is_flat and dtype == "f16" else 4)
        assert counters["dq"].unit_mma == 2 * 4 * 3


# Of a lane, per block: additions and multiplications (fused ones are one), loads, products, exponentials; registers of
# data, of which 128 less about 14 for addresses and counters are there. Loads that a hand count gives are those of
# test_budgets, and the statistics of four or eight queries.
OPEN_BLOCKS = {
    "BACKWARD_DKDV(f16, unit, 64, 64, 4, 2, 16)": (("wants_grad_key", "wants_grad_value"), 24, 25, 16, 8, 102),
    "BACKWARD_DKDV(f16, unit, 80, 80, 4, 2, 32)": (("wants_grad_key",), 48, 56, 30, 16, 116),
    "BACKWARD_DKDV(f16, unit, 128, 128, 4, 2, 16)": (("wants_grad_key",), 24, 44, 24, 8, 106),
    "BACKWARD_DQ(f16, unit, held, 64, 64, 4, 2, 16)": ((), 24, 13, 12, 8, 96),
    "BACKWARD_DQ(f16, unit, reread, 128, 128, 4, 2, 16)": ((), 24, 40, 24, 8, 104),
}


@pytest.mark.parametrize("row", OPEN_BLOCKS)
def test_instructions_of_an_open_block(row: str) -> None:
    """In a kernel with a window as well: an open block has no code for it, nor for rows that are not there."""
    wants, operations, loads, products, exponentials, registers = OPEN_BLOCKS[row]
    header = "dkdv" if "DKDV" in row else "dq"
    source = f'#include "unit/backward_{header}.h"\nnamespace mfa {{\n{row}\n}}\n'
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
    assert counts["store"] == counts["conversion"] == counts["move"] == 0
    assert step.registers <= registers
