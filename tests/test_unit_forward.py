"""metal/unit/, the forward pass on M5's matrix unit, in the simulator: right by the numerics rule, without a race, and
as cheap as a hand count says."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import pytest
import test_attention
import test_varlen
import torch
from conftest import Device
from functorch.compile import aot_function
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from plan_problems import METAL
from serving import Packed, packed_problems
from simulator_engine import ROOT
from strategies import Problem, problems
from test_block_attention import Blocked, block_mask_of
from test_dropout import check as check_dropout
from torch import Tensor

import mfa

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

pytestmark = pytest.mark.simulator

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
# (D, Dv): of a SIMD-group by itself, and of teams of two and of four.
ALONE = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128))
PAIRS = ((192, 192), (256, 256))
TEAMS = ((320, 320), (384, 384), (512, 512), (576, 512))
DIMS = (*ALONE, *PAIRS, *TEAMS)
LENGTHS = (1, 15, 16, 17, 32, 33, 63, 64, 65, 97, 130)
HEADS = ((1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3))  # batch, key heads, group
MORE_THAN_DECODE_TAKES = {1: LENGTHS[-3:], 3: (171, 180)}  # queries, by group
LARGEST_PRODUCT = 6_000_000  # multiply-accumulates
USUAL: dict[str, Any] = {"layouts": ("contiguous",) * 3, "window": (None, None), "is_causal": False, "scale": None}
PROBLEM = Problem(torch.float16, 1, 1, 1, 77, 131, 64, 64, **USUAL)


@dataclass(frozen=True)
class M5(Device):
    """The simulator of an M5, and what it ran."""

    name: str = "simulator"
    family: str = "apple10"
    kernels: list[str] = field(default_factory=list)

    @contextmanager
    def active(self, seed: int = 0) -> Iterator[mfa.Simulation]:  # type: ignore[override]
        with super().active(seed) as sim:  # type: ignore[attr-defined]
            yield sim
        self.kernels.extend(launch.kernel for launch in sim.launches)


def usual(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((values[0],) * len(values) + values)


@st.composite
def dense_problems(draw: st.DrawFn) -> Problem:
    """Of every feature, and of rows that the kernels take: aligned, of a bucket, and more than decode takes."""
    batch, key_heads, group = draw(st.sampled_from(HEADS))
    queries = LENGTHS[1:] if group == 1 else MORE_THAN_DECODE_TAKES[group]
    lengths = draw(st.sampled_from(queries)), draw(st.sampled_from(LENGTHS))
    pairs = batch * key_heads * group * lengths[0] * lengths[1]
    head_dim, value_dim = draw(st.sampled_from([dims for dims in DIMS if pairs * dims[0] <= LARGEST_PRODUCT]))
    return replace(
        draw(problems(dtypes=tuple(DTYPES.values()))),
        batch=batch,
        key_heads=key_heads,
        group=group,
        query_length=lengths[0],
        key_length=lengths[1],
        head_dim=head_dim,
        value_dim=value_dim,
        layouts=draw(st.tuples(*[usual("contiguous", "transposed", "one head", "one batch")] * 3)),
        scale=draw(usual(None, 0.0, -1 / math.sqrt(head_dim), 4 / math.sqrt(head_dim))),
    )


@st.composite
def blocked_problems(draw: st.DrawFn) -> Blocked:
    block = st.integers(1, 12).map(lambda n: 16 * n)
    return Blocked(
        **replace(draw(dense_problems()), bias=("bool", (False, False, False, False))).__dict__,
        density=draw(st.sampled_from((0.0, 0.2, 0.5, 0.9, 2.0))),
        alike=(draw(st.booleans()), draw(st.booleans())),
        block=(draw(block), draw(block)),
    )


@st.composite
def sequences(draw: st.DrawFn) -> Packed:
    problem = draw(packed_problems(dtypes=tuple(DTYPES.values())))
    # Few keys, or a scale of 0, give plain PyTorch a log-sum-exp without any error, and lse is only as exact as exp2.
    length = st.sampled_from((0, 17, 33, 65, 130))
    group = draw(usual(1, 3))
    lengths = (
        (draw(st.sampled_from(MORE_THAN_DECODE_TAKES[group])), draw(length)),
        *draw(st.lists(st.tuples(length, length), max_size=3)),
    )
    pairs = problem.key_heads * group * sum(a * b for a, b in lengths)
    dims = draw(st.sampled_from([dims for dims in DIMS if dims == DIMS[0] or pairs * dims[0] <= LARGEST_PRODUCT]))
    return replace(
        problem,
        lengths=lengths,
        group=group,
        dims=dims,
        scale=draw(usual(None, -0.25, 0.1)),
        uses=draw(usual("all keys", "some")),
    )


def check_random(shard: int, count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any, M5], None]) -> None:
    device = M5()

    @seed(shard)
    @settings(max_examples=count)
    @given(strategy)
    def holds(problem: Any) -> None:
        check(problem, device)

    holds()
    forward = [kernel for kernel in device.kernels if kernel.startswith("forward")]
    assert all("_unit_" in kernel for kernel in forward)
    assert len(forward) > count  # each problem runs two or three times, a few of one head's by decode


def check_trained(problem: Problem, device: M5) -> None:
    """With a query that requires a gradient, so that the kernel writes the correction and refines more often."""
    attention = mfa.attention

    def trained(query: Tensor, *others: Tensor, **terms: Any) -> list[Tensor]:
        return [x.detach() for x in attention(query.detach().requires_grad_(), *others, **terms)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfa, "attention", trained)
        test_attention.check(problem, device)


def check_blocked(problem: Blocked, device: M5) -> None:
    """Its mask as block mask."""
    attention = mfa.attention

    def blocked(*tensors: Tensor, attn_mask: Tensor, **terms: Any) -> Any:
        return attention(*tensors, **terms, block_mask=block_mask_of(attn_mask, problem.block, "cpu"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfa, "attention", blocked)
        test_attention.check(problem, device)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, M5], None]]] = {
    "served": (dense_problems(), test_attention.check),
    "trained": (dense_problems(), check_trained),
    "blocked": (blocked_problems(), check_blocked),
    "packed": (sequences(), test_varlen.check),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems(kind: str) -> None:
    check_random(0, 8, *KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_more_random_problems(kind: str, shard: int) -> None:
    check_random(shard, 30, *KINDS[kind])


def test_lse_of_large_scores() -> None:
    """Rounded once: ALiBi's scores reach -57 here, and three roundings were more than twice plain PyTorch's error."""
    changes = {
        **{"dtype": torch.bfloat16, "group": 3, "query_length": 171, "key_length": 97, "head_dim": 80, "value_dim": 80},
        **{"layouts": ("transposed", "contiguous", "contiguous"), "scale": 4 / math.sqrt(80), "alibi": "heads"},
        **{"bias": ("bool", (False, True, False, True)), "seed": 22652},
    }
    test_attention.check(replace(PROBLEM, **changes), M5())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 2, 40])
def test_dropout_of_few_rows(keys: int, dtype: str) -> None:
    """Their gradients are what is left where delta cancels dP: what rounding took from P would show in bfloat16 too."""
    for number in range(12):
        changes = {"dtype": DTYPES[dtype], "query_length": 1, "key_length": keys, "scale": 1.0, "seed": number}
        check_dropout(replace(PROBLEM, **changes), 0.1, "apple10")


@pytest.mark.slow
def test_dropout() -> None:
    """Values and gradients."""

    @seed(0)
    @settings(max_examples=20)
    @given(dense_problems(), st.sampled_from((0.1, 0.5, 0.9)))
    def holds(problem: Problem, dropout_p: float) -> None:
        check_dropout(problem, dropout_p, "apple10")

    holds()


def launch(
    dtype: str, dims: tuple[int, int], lengths: tuple[int, int], *, trains: bool = False, deviation: float = 1
) -> mfa.Launch:
    """Of one head, and right; `deviation` is that of Q."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((lengths[0], dims[0]), (lengths[1], dims[0]), (lengths[1], dims[1]))
    query, key, value = (torch.randn(1, 1, *shape, generator=generator).to(DTYPES[dtype]) for shape in shapes)
    query = deviation * query
    with mfa.simulate("apple10") as sim:
        out = mfa.attention(query.clone().requires_grad_(trains), key, value)
    expected, plain = (function(query, key, value)[0] for function in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)
    (found,) = sim.launches
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", DIMS)
def test_products_and_threadgroup_memory(dims: tuple[int, int], dtype: str) -> None:
    """Products as the matrices have. A SIMD-group by itself meets nobody; of a team each writes its part of S, 2 KB per
    block, reads those of the others, and waits once."""
    length, blocks, simdgroups = 128, 4, 4 if dims in ALONE else 8
    members = 1 if dims in ALONE else 2 if dims in PAIRS else 4
    found = launch(dtype, dims, (length, length), deviation=0.01)  # so that nothing is refined
    counters, tiles = found.counters, length // 16
    assert counters.unit_mma == length * length * sum(dims) // 4096
    assert (counters.mma, counters.simdgroup_barriers) == (0, 0)
    assert counters.shuffles == tiles * members * 2 * 4  # where a first maximum is found, and at the end
    path = "unit" if members == 1 else "unit_team"
    assert found.kernel == f"forward_{dtype}_d{dims[0]}_v{dims[1]}_{path}_s{simdgroups}_r2_k32"
    if members == 1:
        assert counters.threadgroup_barriers == counters.threadgroup_reads == counters.threadgroup_writes == 0
        assert found.threadgroup_memory == 0
    else:
        assert counters.threadgroup_barriers == tiles * members * blocks
        assert counters.threadgroup_write_bytes == tiles * members * blocks * 2048
        assert counters.threadgroup_read_bytes == tiles * members * blocks * 2048 * (members - 1)
        assert found.threadgroup_memory == 32 * 1024


def test_loads() -> None:
    """Per 16 queries and 32 keys of D 64 16 loads; then Q."""
    assert launch("bf16", (64, 64), (64, 128)).counters.fragment_loads == 4 * 32 * (4 * 16 + 4)


@pytest.mark.parametrize("dims", [(64, 64), (256, 256)])
def test_a_block_that_one_key_is_missing_of_is_not_open(dims: tuple[int, int]) -> None:
    launch("f16", dims, (33, 31))
    launch("f16", dims, (64, 63))


def test_a_team_without_rows_does_nothing() -> None:
    assert launch("bf16", (256, 256), (17, 64)).counters.unit_mma == 2 * 2 * 64


# Additions and multiplications (fused ones are one), integer operations (16 of them round P) and loads of a lane, per
# 16 queries and 32 keys. A hand count gives 51 and 18 of the first and the last at D 64, 55 and 42 at D 128; MLX 0.32.4
# has 94, 62 and 43, 128, 97 and 88, with 16 shuffles. A member of a team adds up S, 16 scores per other member, and
# loads the others' parts (4 per member) and a parameter.
OPEN_BLOCK = {
    "FORWARD(f16, unit, split, 64, 64, 4, 2, 32)": (40, 38, 16),
    "FORWARD(bf16, unit, split, 64, 64, 4, 2, 32)": (40, 38, 16),
    "FORWARD(f16, unit, shared, 128, 128, 4, 2, 32)": (40, 52, 40),
    "FORWARD(bf16, unit, shared, 128, 128, 4, 2, 32)": (40, 52, 40),
    "FORWARD(f16, unit_team, shared, 256, 256, 8, 2, 32)": (40 + 16, 61, 40 + 4 + 1),
    "FORWARD(bf16, unit_team, shared, 512, 512, 8, 2, 32)": (40 + 48, 65, 40 + 12 + 1),
}


@pytest.mark.parametrize("row", OPEN_BLOCK, ids=lambda row: row.replace(" ", ""))
def test_instructions_of_an_open_block(row: str) -> None:
    """In a kernel with a window as well: an open block has no code for it, nor for rows that are not there."""
    assert row in (METAL / "unit" / "instances.def").read_text()
    _, path, _, dim = row.removeprefix("FORWARD(").split(", ")[:4]
    source = f'#include "unit/forward_team.h"\nnamespace mfa {{\n{row}\n}}\n'
    true = ["is_aligned", "is_exact_head", "writes_lse", "has_correction", "has_window"]
    function = instructions.kernel_of(instructions.emit(source, [METAL], true, standard="metal4.0"))
    step = instructions.step_of(function)
    blocks = instructions.usual_blocks(function, *instructions.main_loop(function))
    operations = sum(
        times * instructions.classify(instruction)[1]
        for name, times in blocks.items()
        for instruction in function.blocks[name]
        if is_sum_or_product(instruction)
    )
    most_operations, most_integers, loads = OPEN_BLOCK[row]
    counts, share = step.counts, min(int(dim), 128)  # of D, for a SIMD-group
    assert operations <= most_operations
    assert counts["integer"] <= most_integers
    assert (counts["load"], counts["unit_mma"], counts["shuffle"], counts["exp"]) == (loads, share // 4, 0, 16)
    assert counts["vote"] == 1  # on maxima and refinement
    assert (counts["store"], counts["barrier"]) == ((4, 1) if path == "unit_team" else (0, 0))
    assert counts["conversion"] == counts["move"] == 0
    assert step.registers <= 106  # beside addresses and counters


def is_sum_or_product(instruction: instructions.Instruction) -> bool:
    return instruction.opcode in ("fadd", "fsub", "fmul") or "@llvm.fma." in instruction.text


@pytest.mark.parametrize("trains", [False, True])
def test_large_probabilities_are_refined(trains: bool) -> None:
    """Of float16, in blocks where a probability is more than a share of the sum so far; O then takes another product.
    One key of the 32 that a block has weighs so much more than the others that it has that share, or just not, of what
    a lane knows: its own eight keys, for a quarter of the sum."""
    share = 1 / 16 if trains else 1 / 8
    limit = 7 * 4 * share / (1 - 4 * share)
    for weight, refined in ((0.97 * limit, 0), (1.03 * limit, 8)):
        query, key = torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 32, 64)
        value = torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(1))
        query[..., 0], key[:, :, 5, 0] = 8, math.log(weight)
        query, key, value = (tensor.half() for tensor in (query, key, value))
        with mfa.simulate("apple10") as sim:
            out = mfa.attention(query.clone().requires_grad_(trains), key, value).detach()
        assert sim.counters.unit_mma == 16 + refined
        expected, plain = (function(query, key, value)[0] for function in (oracle.attention, oracle.composition))
        summands = oracle.attention(query, key, value.abs())[0]
        assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected, summands=summands)


def refined_blocks(query: Tensor, key: Tensor, share: float) -> int:
    """Of 32 keys and 16 queries, where a lane has a P that is more than a share of four times its part of the sum."""
    scores = (query @ key.mT).double() * math.log2(math.e) / math.sqrt(query.shape[-1])
    # By lane: of 16 keys each has four neighbours.
    blocks = scores.reshape(len(query) // 16, 16, len(key) // 32, 2, 4, 4).permute(2, 0, 1, 4, 3, 5).flatten(-2)
    maximum, total, refined = torch.full((len(query) // 16, 16, 1, 1), -math.inf), torch.zeros(1), 0
    for block in blocks:
        largest = block.amax((-1, -2), keepdim=True)
        moved = torch.where(largest > maximum + 8, largest, maximum)
        total, maximum = total * torch.exp2(maximum - moved), moved
        weights = torch.exp2(block - maximum)
        total = total + weights.sum(-1, keepdim=True)
        refined += int((weights > 4 * share * total).flatten(1).any(1).sum())
    return refined


@pytest.mark.parametrize(("dtype", "trains"), [("f16", False), ("f16", True), ("bf16", True)])
@pytest.mark.parametrize(("dim", "deviation"), [(64, 0.8), (64, 1), (64, 1.5), (80, 1), (128, 1)])
def test_which_blocks_are_refined(dim: int, deviation: float, dtype: str, trains: bool) -> None:
    """Not those in which nothing is large, though a limit of scores that is older than the sum asks for a look."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 1, length, dim, generator=generator) for length in (160, 256, 256))
    query, key, value = (tensor.to(DTYPES[dtype]) for tensor in (deviation * query, key, value))
    with mfa.simulate("apple10") as sim:
        mfa.attention(query.clone().requires_grad_(trains), key, value)
    share = 1 / 16 if trains and dtype == "f16" else 1 / 8
    refined = refined_blocks(query[0, 0].float(), key[0, 0].float(), share)
    assert sim.counters.unit_mma == (80 * 16 + 8 * refined) * dim // 64
    assert 0 < refined < 80


def test_probabilities_are_rounded_not_cut() -> None:
    """Of 256 keys that all have the value 1: cut, O would be 3e-4 too small."""
    generator = torch.Generator().manual_seed(4)
    query, key = (0.5 * torch.randn(1, 1, length, 64, generator=generator).half() for length in (64, 256))
    with mfa.simulate("apple10") as sim:
        out = mfa.attention(query, key, torch.ones_like(key))
    assert sim.counters.unit_mma > 0
    assert float((out.double() - 1).mean().abs()) < 5e-5


@pytest.mark.parametrize("dim", [64, 80])
def test_a_refined_product_has_what_rounding_took(dim: int) -> None:
    """Of two keys that matter, whose values all but cancel: rounding one of them to 11 bits would leave 1e-4 of O."""
    query, key = torch.zeros(1, 1, 64, dim), torch.full((1, 1, 96, dim), -30.0)
    query[..., 0], key[..., 1:], key[:, :, 7, 0], key[:, :, 40, 0] = math.sqrt(dim), 0, math.log(2), 0
    value = torch.zeros(1, 1, 96, dim)
    value[:, :, 7], value[:, :, 40] = 1, -2
    query, key, value = query.half(), key.half(), value.half()
    with mfa.simulate("apple10") as sim:
        out = mfa.attention(query, key, value)
    assert sim.counters.unit_mma > 4 * 3 * dim // 4
    assert oracle.largest_error(out, oracle.attention(query, key, value)[0]) < 1e-6


def test_negative_scale() -> None:
    """Of scores whose smallest product is the largest, by far."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 1, length, 64, generator=generator).half() for length in (64, 96, 96))
    with mfa.simulate("apple10") as sim:
        out = mfa.attention(8 * query, key, value, scale=-1.0)
    assert sim.counters.unit_mma > 0
    expected, plain = (f(8 * query, key, value, scale=-1.0)[0] for f in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)


def test_what_dropout_keeps_is_refined_as_it_then_is() -> None:
    """Ten times as large here: more than a half of a lane's part of the sum, 8 per block, in two of three blocks."""
    zeros = torch.zeros(1, 1, 96, 64, dtype=torch.float16)
    with mfa.simulate("apple10", seed=0) as sim:
        mfa.attention(zeros[:, :, :64], zeros, zeros, dropout_p=0.9)
    assert sim.counters.unit_mma == 4 * 3 * 16 + 4 * 2 * 8


@pytest.mark.parametrize("scale", [0.11, 0.12, 0.13, 0.14])
def test_huge_scores(scale: float) -> None:
    """All alike: an FMA would leave what rounding took from the maximum, hundreds, as exponent."""
    query, key = (torch.full((1, 1, length, 64), 3e4, dtype=torch.float16) for length in (64, 96))
    value = torch.randn(1, 1, 96, 64, generator=torch.Generator().manual_seed(3)).half()
    with mfa.simulate("apple10") as sim:
        out = mfa.attention(query, key, value, scale=scale)
    assert sim.counters.unit_mma >= 4 * 3 * 16
    torch.testing.assert_close(out.double(), value.double().mean(2, keepdim=True).expand_as(out), atol=2e-4, rtol=0)


def test_how_often_probabilities_are_refined() -> None:
    plain = 4 * 8 * 16

    def count(dtype: str = "f16", **terms: Any) -> int:
        return launch(dtype, (64, 64), (64, 256), **terms).counters.unit_mma

    assert count(trains=True, deviation=0.01) == plain
    assert plain < count() < count(trains=True) < 1.4 * plain
    assert count(deviation=8) > 1.3 * plain
    assert count("bf16", deviation=8) == plain
    assert plain < count("bf16", trains=True) < count(trains=True)


TERMS = {"attn_mask": (64, 256), "sinks": (2,), "alibi_slopes": (2,)}  # with a gradient, and their shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TERMS)
def test_all_products_are_refined_where_a_term_is_trained(name: str, dtype: str) -> None:
    """And not where it is only there: as slopes of ALiBi mostly are."""
    plain = 2 * 4 * 8 * 16

    def count(*trained: str) -> int:
        generator = torch.Generator().manual_seed(1)
        shapes = {"query": (1, 2, 64, 64), "key": (1, 2, 256, 64), "value": (1, 2, 256, 64), name: TERMS[name]}
        tensors = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors = {key: x if key in ("sinks", "alibi_slopes") else x.to(DTYPES[dtype]) for key, x in tensors.items()}
        for trains in trained:
            tensors[trains].requires_grad_()
        with mfa.simulate("apple10") as sim:
            mfa.attention(**tensors)
        return sim.counters.unit_mma

    assert count() == count("query") == count("value", "key") == plain
    assert count(name) == count("query", name) == 1.5 * plain


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_all_products_of_packed_rows_are_refined_where_a_term_is_trained(name: str) -> None:
    starts = torch.tensor([0, 64], dtype=torch.int32)

    def count(trains: bool) -> int:
        query = torch.zeros(64, 2, 64, dtype=torch.float16, requires_grad=True)
        term = torch.zeros(2).requires_grad_(trains)
        with mfa.simulate("apple10") as sim:
            mfa.attention_varlen(query, query, query, starts, starts, 64, 64, **{name: term})
        return sim.counters.unit_mma

    assert count(True) == 1.5 * count(False) > 0


def test_products_without_terms_are_refined_as_always() -> None:
    """Also through the op, whose default is that there are some and that they are trained."""
    query = torch.full((1, 1, 64, 64), 0.01, dtype=torch.bfloat16)
    with mfa.simulate("apple10") as sim:
        torch.ops.mfa.attention_forward_with_correction(
            query, query, query, None, None, None, 0.125, None, None, 0.0, 0.0, None, None
        )
    assert sim.counters.unit_mma == 4 * 2 * 16


@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_graph_knows_whether_a_term_is_trained(trains: bool) -> None:
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    query, slopes = torch.randn(1, 2, 5, 16, requires_grad=True), torch.randn(2).requires_grad_(trains)
    aot_function(lambda query, slopes: mfa.attention(query, query, query, alibi_slopes=slopes), compiler)(query, slopes)
    [call] = graphs[0].graph.find_nodes(
        op="call_function", target=torch.ops.mfa.attention_forward_with_correction.default
    )
    given = dict(zip([argument.name for argument in call.target._schema.arguments], call.args, strict=False))
    assert given.get("trains_terms", True) is trains
