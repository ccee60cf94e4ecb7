"""metal/unit/, the forward pass on M5's matrix unit, in the simulator: right by the numerics rule, and without a race.

The plan doesn't know these kernels yet: a library has them under the names of staged ones with the same tiles.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from plan_problems import METAL
from simulator_engine import ROOT, build_kernels

import mfa
from mfa import _library

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

pytestmark = pytest.mark.simulator

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
MEMORY = {64: "split", 80: "shared", 128: "shared"}
AS_STAGED = """
#define FORWARD_AS_STAGED(dtype, memory, dim)                                                        \\
  template [[host_name("forward_" #dtype "_d" #dim "_v" #dim "_staged_s4_r2_k32")]] [[kernel]]       \\
  decltype(forward_unit<dtype, memory, dim, dim, 4, 2, 32>) forward_unit<dtype, memory, dim, dim, 4, 2, 32>;
"""


def built(directory: Path, dims: tuple[int, ...], mode: str = "count", metal: Path = METAL) -> Path:
    sources = [directory / f"{dtype}.metal" for dtype in DTYPES]
    for source in sources:
        rows = "".join(f"FORWARD_AS_STAGED({source.stem}, {MEMORY[dim]}, {dim})\n" for dim in dims)
        source.write_text(f'#include "unit/forward.h"\n{AS_STAGED}namespace mfa {{\n{rows}}}\n')
    return build_kernels(sources, directory / "unit.so", mode=mode, include_dirs=[metal], standard="metal4.0")


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("unit"), (64,))


@pytest.fixture(scope="session")
def thorough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("unit"), tuple(MEMORY))


@pytest.fixture
def prefer() -> Iterator[None]:
    yield
    _library.prefer_instance(None)


# Terms of mfa.attention, with `lengths` and, of grouped heads, `group`.
PROBLEMS: dict[str, dict] = {
    "dense": {"lengths": (64, 64)},
    "ragged": {"lengths": (77, 131), "group": 2},
    "causal": {"lengths": (100, 100), "is_causal": True},
    "window": {"lengths": (65, 97), "window": (30, 9)},
    "bias": {"lengths": (65, 96), "bias": "float"},
    "mask": {"lengths": (70, 97), "bias": "bool"},
    "softcap": {"lengths": (33, 64), "softcap": 4.0},
    "alibi": {"lengths": (50, 70), "alibi_slopes": True},
    "sinks": {"lengths": (50, 70), "sinks": True},
}


def check(
    library: Path, dtype: str, dim: int, terms: dict, seed: int, *, trains: bool = False, deviation: float = 1
) -> mfa.Counters:
    """`deviation` is that of Q."""
    terms, generator = dict(terms), torch.Generator().manual_seed(seed)
    (length_q, length_k), heads, group = terms.pop("lengths"), 2, terms.pop("group", 1)
    shapes = [(1, heads, length_q, dim), *[(1, heads // group, length_k, dim)] * 2]
    query, key, value = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for shape in shapes)
    query = (deviation * query).requires_grad_(trains)
    if kind := terms.pop("bias", None):
        noise = torch.randn(1, heads, length_q, length_k, generator=generator)
        terms["bias"] = noise > -0.5 if kind == "bool" else noise.to(DTYPES[dtype])
    for name in {"alibi_slopes", "sinks"} & terms.keys():
        terms[name] = torch.rand(heads, generator=generator)
    own = {"attn_mask" if name == "bias" else name: term for name, term in terms.items()}
    kernel = f"forward_{dtype}_d{dim}_v{dim}_staged_s4_r2_k32"
    _library.prefer_instance(kernel)
    checks = ("races", "bounds", "uninitialised")
    with mfa.simulate("apple10", checks=checks, seed=seed, kernel_library=library) as sim:
        out, lse = mfa.attention(query, key, value, return_lse=True, enable_gqa=group > 1, **own)
    assert sim.launches[-1].kernel == kernel
    if terms.pop("is_causal", False):
        terms["window"] = (None, 0)
    expected, expected_lse = oracle.attention(query, key, value, **terms)
    plain, plain_lse = oracle.composition(query, key, value, **terms)
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)
    assert oracle.largest_error(lse, expected_lse) <= oracle.tolerance(plain_lse, expected_lse)
    return sim.launches[-1].counters


@pytest.mark.parametrize("name", ["ragged", "causal", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quick(quick: Path, prefer: None, dtype: str, name: str) -> None:
    check(quick, dtype, 64, PROBLEMS[name], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dim", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_thorough(thorough: Path, prefer: None, dtype: str, dim: int, name: str) -> None:
    for seed in range(3):
        check(thorough, dtype, dim, PROBLEMS[name], seed)
        check(thorough, dtype, dim, PROBLEMS[name], seed, trains=True, deviation=1 + seed)


def test_budget(quick: Path, prefer: None) -> None:
    """Per 16 queries and 32 keys of D 64 16 products of 16x16x16, 16 loads and 4 shuffles; then Q, and the sums."""
    counters = check(quick, "bf16", 64, {"lengths": (64, 128)}, 1)
    tiles, blocks = 2 * 4, 4
    assert counters.unit_mma == tiles * blocks * 16
    assert counters.fragment_loads == tiles * 32 * (blocks * 16 + 4)
    assert counters.shuffles == tiles * (blocks * 4 + 4)
    assert (counters.mma, counters.threadgroup_barriers, counters.simdgroup_barriers) == (0, 0, 0)
    assert counters.threadgroup_reads == counters.threadgroup_writes == 0


# Additions and multiplications (fused ones are one) and loads of a lane, per 16 queries and 32 keys. A hand count gives
# 51 and 18, 55 and 42; MLX 0.32.4 has 94 and 43, 128 and 88, with 16 shuffles.
OPEN_BLOCK = {("f16", 64): (44, 16), ("bf16", 64): (42, 16), ("f16", 128): (44, 40), ("bf16", 128): (42, 40)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_instructions_of_an_open_block(dtype: str, dim: int) -> None:
    """In a kernel with a window as well: an open block has no code for it, nor for rows that are not there."""
    row = f"FORWARD({dtype}, unit, {MEMORY[dim]}, {dim}, {dim}, 4, 2, 32)"
    source = f'#include "unit/forward.h"\nnamespace mfa {{\n{row}\n}}\n'
    true = ["is_aligned", "is_exact_head", "writes_lse", "has_correction", "has_window"]
    function = instructions.kernel_of(instructions.emit(source, [METAL], true, standard="metal4.0"))
    step = instructions.step_of(function)
    blocks = instructions.usual_blocks(function, *instructions.main_loop(function))
    usual = [(i, times) for name, times in blocks.items() for i in function.blocks[name]]
    operations = sum(times * instructions.classify(i)[1] for i, times in usual if is_sum_or_product(i))
    most_operations, loads = OPEN_BLOCK[dtype, dim]
    assert operations <= most_operations
    counts = step.counts
    assert (counts["load"], counts["unit_mma"], counts["shuffle"], counts["exp"]) == (loads, dim // 4, 4, 16)
    assert counts["reduce"] == (dtype == "f16")  # the vote on refinement
    assert counts["store"] == counts["barrier"] == counts["conversion"] == counts["move"] == 0
    assert step.registers <= 112  # beside addresses and counters


def is_sum_or_product(instruction: instructions.Instruction) -> bool:
    return instruction.opcode in ("fadd", "fsub", "fmul") or "@llvm.fma." in instruction.text


def test_large_probabilities_are_refined(quick: Path, prefer: None) -> None:
    """Of float16, in blocks where a probability is more than a part of the sum so far; O then takes another product."""
    plain, dense = 4 * 8 * 2 * 16, {"lengths": (64, 256)}
    count = functools.partial(check, quick, dim=64, terms=dense, seed=1)
    assert count("f16", trains=True, deviation=0.01).unit_mma == plain
    served, trained = (count("f16", trains=trains).unit_mma for trains in (False, True))
    assert plain < served < trained < 1.4 * plain
    assert count("f16", deviation=8).unit_mma > 1.3 * plain
    assert count("bf16", trains=True, deviation=8).unit_mma == plain
