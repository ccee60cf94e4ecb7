"""Dropout: the same mask on every device, right values and gradients given the mask, and the statistics of the mask."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.testing
from gradient_rule import Change, differentiate, shares
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from strategies import DTYPES, Problem, problems
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import mfa
from mfa import sdpa
from mfa._cpu import blocks, dropout

FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default
PLACES = ("cpu", "apple7", "apple9")  # CPU tensors by themselves, and in the simulator of a GPU family
EACH = [pytest.param(place, marks=() if place == "cpu" else pytest.mark.simulator) for place in PLACES]
STATE = torch.tensor([-(2**62) - 12345, 2**40 + 99])


def active(place: str) -> AbstractContextManager[Any]:
    if place == "cpu":
        return nullcontext()
    return mfa.simulate(place, checks=("races", "bounds", "uninitialised"))


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> list[np.ndarray]:
    """Philox4x32 as in Salmon et al. 2011, on four words of uint64."""
    word = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c, k = list(counter), [np.uint64(part) for part in key]
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [right >> half ^ c[1] ^ k[0], right & word, left >> half ^ c[3] ^ k[1], left & word]
        k = [(part + np.uint64(step)) & word for part, step in zip(k, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return c


def kept(state: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """bool [B,Hq,Lq,Lk]: what dropout leaves."""
    start, offset = (int(part) % 2**64 for part in state)
    b, h, i, j = np.meshgrid(*(np.arange(size, dtype=np.uint64) for size in shape), indexing="ij")
    counter = [j // np.uint64(8), i, b * np.uint64(shape[1]) + h, np.full(shape, offset % 2**32, dtype=np.uint64)]
    words = np.stack(philox(counter, (start % 2**32, start // 2**32)))
    slot = j % np.uint64(8)
    chosen = np.take_along_axis(words, (slot // np.uint64(2)).astype(np.int64)[None], axis=0)[0]
    bits = chosen >> slot % np.uint64(2) * np.uint64(16) & np.uint64(0xFFFF)
    return torch.from_numpy(bits >= threshold(dropout_p))


def threshold(dropout_p: float) -> int:
    return math.floor(dropout_p * 65536 + 0.5)


def factors(state: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """What P is multiplied by, float64."""
    return kept(state, shape, dropout_p).double() * (65536 / (65536 - threshold(dropout_p)))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(lengths: tuple[int, int] = (9, 7), dim: int = 16, batch: int = 2, heads: int = 4) -> list[Tensor]:
    query, key = lengths
    return [normal(batch, heads, length, dim, seed=i) for i, length in enumerate((query, key, key))]


def call_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, state: Tensor | None = STATE
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = FORWARD(
        *(query, key, value, None, None, None, query.shape[3] ** -0.5, None, None, 0.0, dropout_p, state, None)
    )
    return result


# -- the mask -------------------------------------------------------------------------------------------------------


def test_philox_is_philox() -> None:
    """The known answers of the authors' library Random123, for 7 rounds."""
    zeros = [np.zeros(1, dtype=np.uint64)] * 4
    assert [int(word[0]) for word in philox(zeros, (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


words = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=40)
@given(words, words, st.integers(0, 40), st.integers(1, 5), st.integers(0, 40), st.integers(1, 20), st.floats(0, 0.99))
def test_blocks_are_parts_of_the_mask(
    start: int, offset: int, row: int, rows: int, key: int, keys: int, dropout_p: float
) -> None:
    state = torch.tensor([start, offset])
    block = (slice(row, row + rows), slice(key, key + keys))
    heads = torch.tensor([[1, 2], [4, 5]])
    actual = dropout.keep_factors(state, heads, *block, dropout_p, torch.float64)
    expected = factors(state, (2, 3, row + rows, key + keys), dropout_p)
    torch.testing.assert_close(actual, expected[:, 1:, block[0], block[1]], rtol=0, atol=0)


@pytest.mark.parametrize("place", EACH)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(19, 45), (5, 130)], ids=str)
def test_same_mask_everywhere(place: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    """With the identity as value, out is P, and dropped where it is 0; with it as grad_out, dV is P transposed."""
    if place != "cpu" and dtype == torch.float64:
        pytest.skip("the Metal kernels have no float64")
    query_length, key_length = lengths
    query, key = normal(2, 4, query_length, 8, dtype=dtype), normal(2, 2, key_length, 8, dtype=dtype, seed=1)
    identity = torch.eye(key_length, dtype=dtype).expand(2, 2, -1, -1)
    rows = torch.eye(query_length, dtype=dtype).expand(2, 4, -1, -1)
    value = torch.ones(2, 2, key_length, query_length, dtype=dtype)
    terms = (None, None, None, 0.25, None, None, 0.0, 0.4, STATE, None)
    with active(place):
        out, _ = FORWARD(query, key, identity, *terms)
        results = FORWARD(query, key, value, *terms)
        wanted = [False, False, True, False, False, False]
        grad = BACKWARD(query, key, value, *terms, rows, None, *results, None, wanted)[2]
    mask = kept(STATE, (2, 4, query_length, key_length), 0.4)
    assert torch.equal(out != 0, mask)
    assert torch.equal(grad != 0, mask.unflatten(1, (2, 2)).any(2).transpose(-1, -2))  # of the heads in a group


# -- values and gradients, given the mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", EACH)
def test_values_and_gradients(place: str) -> None:
    """The numerics rule, with every other feature; and lse doesn't know about dropout."""

    @seed(0)
    @settings(max_examples=40 if place == "cpu" else 20)
    @given(problems(dtypes=(*DTYPES, torch.float64) if place == "cpu" else DTYPES), st.sampled_from((0.1, 0.5, 0.9)))
    def holds(problem: Problem, dropout_p: float) -> None:
        check(problem, dropout_p, place)

    holds()


def check(problem: Problem, dropout_p: float, place: str) -> None:
    (query, key, value), terms = problem.arguments()
    tensors = {"query": query, "key": key, "value": value}
    for name in ("attn_mask", "sinks", "alibi_slopes"):
        tensor = terms.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    terms.pop("enable_gqa")
    shape = (problem.batch, problem.query_heads, problem.query_length)
    grads = (
        normal(*shape, problem.value_dim, dtype=problem.dtype, seed=problem.seed + 1),
        normal(*shape, seed=problem.seed + 2),
    )
    torch.manual_seed(problem.seed)
    by = factors(dropout.new_state(query.device), (*shape, problem.key_length), dropout_p)

    def leaves(dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: tensor if tensor.dtype == torch.bool else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
            for name, tensor in tensors.items()
        }

    def reference(
        query: Tensor, key: Tensor, value: Tensor, order: Any = None, **given: Tensor
    ) -> tuple[Tensor, Tensor]:
        mask = given.get("attn_mask")
        bias = None if mask is None else mask[(None,) * (4 - mask.dim())]
        slopes = given.get("alibi_slopes")
        scores, seen = oracle.logits(query, key, bias=bias, alibi_slopes=slopes, order=order, **terms)
        probability, lse = oracle.weights(scores, seen, given.get("sinks"))
        kept = by if order is None else by[:, :, order[0]][..., order[1]]
        repeated = value.repeat_interleave(problem.group, dim=1)
        return torch.einsum("bhij,bhjd->bhid", (probability * kept).to(value.dtype), repeated), lse

    def ours(**given: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(problem.seed)
        options: dict[str, Any] = {**terms, "enable_gqa": problem.group > 1, "dropout_p": dropout_p}
        return mfa.attention(**given, **options, return_lse=True)

    def run(function: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        given = leaves(dtype)
        out, lse = function(**given)
        return out.detach(), lse.detach(), differentiate(lambda **_: (out, lse), given, grads)

    def plain(change: Change) -> dict[str, Tensor]:
        found = run(change(reference), wide)[2]
        return {name: grad.to(tensors[name].dtype) for name, grad in found.items()}

    wide = torch.promote_types(problem.dtype, torch.float32)
    exact, _, expected = run(reference, torch.float64)
    torchs = run(reference, wide)[0].to(problem.dtype)
    with active(place):
        out, lse, actual = run(ours, None)
        without = mfa.attention(**tensors, **terms, enable_gqa=problem.group > 1, return_lse=True)[1]
    torch.testing.assert_close(lse, without.detach(), rtol=1e-5, atol=1e-5)
    assert oracle.largest_error(out, exact) <= oracle.tolerance(torchs, exact)
    for name, share in shares(actual, expected, plain, None if place == "cpu" else problem.dtype).items():
        assert share <= 1, name


def test_gradcheck() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in (*qkv((5, 6), dim=3), normal(4, 5, 6), normal(4))]

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mfa.attention(query, key, value, mask, 0.4, sinks=sinks, softcap=2.0, window=(3, 1))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("scratch", [1, 1 << 14])
def test_any_cut_gives_the_same(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one head at a time."""
    results = []
    for size in (blocks.SCRATCH_BYTES, scratch):
        monkeypatch.setattr(blocks, "SCRATCH_BYTES", size)
        tensors = [tensor.requires_grad_() for tensor in qkv((29, 37))]
        torch.manual_seed(0)
        out = mfa.attention(*tensors, dropout_p=0.5, window=(11, 3))
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    torch.testing.assert_close(*results)


# -- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_mask_is_random(dropout_p: float) -> None:
    """Its share, and its correlations along batch, heads, queries, keys and with the next call, to 5 sigma."""
    torch.manual_seed(0)
    heads = torch.arange(64).view(8, 8)
    states = [dropout.new_state(torch.device("cpu")) for _ in range(2)]
    masks = [
        (dropout.keep_factors(state, heads, slice(0, 128), slice(0, 128), dropout_p, torch.float32) == 0).double()
        for state in states
    ]
    share = threshold(dropout_p) / 65536
    variance = share * (1 - share)
    mask = masks[0] - share
    limit = 5 / mask.numel() ** 0.5
    assert abs(float(mask.mean())) <= limit * variance**0.5
    others = [mask.roll(1, dim) for dim in range(4)] + [mask.roll(8, 3), masks[1] - share]
    for other in others:
        assert abs(float((mask * other).mean())) <= limit * variance


def statistics(outs: Tensor) -> tuple[Tensor, Tensor]:
    return outs.double().mean(0), outs.double().var(0)


def test_expectation_and_variance_and_those_of_sdpa() -> None:
    """Of out, over 4000 draws: those of independent decisions, and of torch's dropout. Each batch entry is a draw."""
    draws, dropout_p = 4000, 0.25
    query, key, value = (tensor.expand(draws, -1, -1, -1) for tensor in qkv((4, 7), dim=8, batch=1, heads=2))
    terms = {"attn_mask": normal(4, 7), "dropout_p": dropout_p}
    torch.manual_seed(0)
    ours = mfa.attention(query, key, value, **terms)
    with sdpa.enabled(cpu=True):
        torch.manual_seed(0)
        assert torch.equal(functional.scaled_dot_product_attention(query, key, value, **terms), ours)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = functional.scaled_dot_product_attention(query, key, value, **terms)

    scores, seen = oracle.logits(query[:1].double(), key[:1].double(), bias=terms["attn_mask"][None, None])
    probability, _ = oracle.weights(scores, seen, None)
    mean = (probability @ value[:1].double())[0]
    variance = (probability.square() @ value[:1].double().square())[0] * dropout_p / (1 - dropout_p)
    for outs in (ours, theirs):
        actual_mean, actual_variance = statistics(outs)
        assert ((actual_mean - mean).abs() <= 5 * (variance / draws).sqrt()).all()
        assert ((actual_variance / variance - 1).abs() <= 5 * (2 / draws) ** 0.5).all()


# -- the generator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", EACH)
def test_manual_seed(place: str) -> None:
    query, key, value = qkv()
    with active(place):
        outs = []
        for number in (0, 0, 1):
            torch.manual_seed(number)
            outs.append([mfa.attention(query, key, value, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[0][1])
    assert not torch.equal(outs[0][0], outs[2][0])


@pytest.mark.simulator
def test_no_dropout_is_free() -> None:
    """It draws nothing, and runs the same operations."""
    tensors = [tensor.requires_grad_() for tensor in qkv()]
    before = torch.get_rng_state()
    counts = []
    for terms in ({}, {"dropout_p": 0.0}):
        with mfa.simulate() as simulation:
            mfa.attention(*tensors, **terms).sum().backward()
        counts.append(astuple(simulation.counters))
        assert not any(launch.constants["has_dropout"] for launch in simulation.launches)
    assert counts[0] == counts[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("place", EACH)
def test_smaller_than_a_draw_is_none(place: str) -> None:
    query, key, value = qkv()
    with active(place):
        assert torch.equal(mfa.attention(query, key, value, dropout_p=1e-6), mfa.attention(query, key, value))


# -- PyTorch's machinery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", EACH[:2])
def test_opcheck(place: str) -> None:
    query, key, value = qkv()
    terms = (0.25, None, 2, 0.0, 0.3, STATE, None)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    with active(place):
        if place == "cpu":
            opcheck(FORWARD, (*leaves, None, None, None, *terms))
            opcheck(torch.ops.mfa.attention.default, (query, key, value, None, 0.3), test_utils="test_schema")
        else:
            opcheck(FORWARD, (query, key, value, None, None, None, *terms))
        arguments = (query, key, value, None, None, None, *terms)
        out, lse = FORWARD(*arguments)
        given = (torch.ones_like(out), torch.ones_like(lse), out, lse, None, [True] * 3 + [False] * 3)
        opcheck(BACKWARD, (*arguments, *given))


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile() -> None:
    """One graph for all lengths, which draws as eager mode does, in each call anew."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mfa.attention(query, key, value, dropout_p=0.3, is_causal=True).sin()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((9, 12), (20, 31), (40, 33)):
        results = []
        for function in (compiled, model):
            tensors = [tensor.requires_grad_() for tensor in qkv(lengths)]
            torch.manual_seed(5)
            outs = [function(*tensors) for _ in range(2)]
            assert not torch.equal(*outs)
            results.append([*outs, *torch.autograd.grad(outs[0].sum(), tensors)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return mfa.attention(query, key, value, dropout_p=0.3)

    program = torch.export.export(Model(), tuple(qkv()))
    results = []
    for module in (program.module(), Model()):
        torch.manual_seed(5)
        results.append(module(*qkv()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    """With the same randomness it is a loop that is seeded in each step; gradients have the mask of the values."""
    query, key, value = normal(3, 2, 4, 5, 8), normal(2, 4, 7, 8, seed=1), normal(2, 4, 7, 8, seed=2)

    def function(query: Tensor) -> Tensor:
        return mfa.attention(query, key, value, dropout_p=0.5)

    torch.manual_seed(0)
    out = torch.vmap(function, randomness=randomness)(query)
    if randomness == "same":
        for i in range(3):
            torch.manual_seed(0)
            torch.testing.assert_close(out[i], function(query[i]))
    same = torch.vmap(function, randomness=randomness)(query[:1].expand(3, -1, -1, -1, -1))
    assert torch.equal(same[0], same[1]) == (randomness == "same")

    def objective(query: Tensor, value: Tensor) -> Tensor:
        return mfa.attention(query, key, value, dropout_p=0.5).sum()

    torch.manual_seed(1)
    values, gradients = torch.vmap(
        lambda query: torch.func.grad_and_value(objective, argnums=1)(query, value)[::-1], randomness=randomness
    )(query)
    torch.testing.assert_close(values, (gradients * value).sum((1, 2, 3, 4)))  # out is linear in value


def test_vmap_asks_for_its_randomness() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda query: mfa.attention(query, query, query, dropout_p=0.5))(normal(3, 2, 4, 5, 8))


def test_batched_gradients() -> None:
    tensors = [tensor.requires_grad_() for tensor in qkv((5, 7))]
    out = mfa.attention(*tensors, dropout_p=0.5)
    grads = normal(3, *out.shape)
    batched = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(out, tensors, grads[i], retain_graph=True)
        torch.testing.assert_close([x[i] for x in batched], list(one))


def test_autocast_and_meta() -> None:
    query, key, value = qkv()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mfa.attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(out, mfa.attention(*(x.bfloat16() for x in (query, key, value)), dropout_p=0.5))
    assert mfa.attention(*(x.to("meta") for x in (query, key, value)), dropout_p=0.5).device.type == "meta"
