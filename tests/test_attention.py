"""mfa.attention against float64, and what has to hold exactly, on every device."""

import math
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from strategies import DTYPES, Problem, problems, shards
from torch import Tensor

import mfa

SEEDS = (0, 1, 2)


def check(problem: Problem, device: Device) -> None:
    """The numerics rule for out and lse; and the same result, bit by bit, whatever the order of execution."""
    tensors, terms = problem.arguments()
    expected = oracle.attention(*tensors, **oracle_terms(terms))
    plain = oracle.composition(*tensors, **oracle_terms(terms))
    query, key, value = tensors
    # The absolute values that are summed to scores, and to outputs; those feel the rounding of the scores too.
    scale = 1 / math.sqrt(problem.head_dim) if problem.scale is None else abs(problem.scale)
    scores = oracle.logits(query.abs().double(), key.abs().double(), scale=scale)[0]
    lse_summands = expected[1].abs().nan_to_num(posinf=0)  # ALiBi makes it large
    summands = oracle.attention(query, key, value.abs(), **oracle_terms(terms))[0]
    if scores.numel():
        ratio = torch.finfo(torch.float32).eps / torch.finfo(problem.dtype).eps
        summands = summands * (1 + scores.max() * min(1, ratio))
        lse_summands = lse_summands + scores.amax(-1)

    moved = [tensor.to(device.type) for tensor in tensors]
    terms = {name: term.to(device.type) if isinstance(term, Tensor) else term for name, term in terms.items()}
    results = []
    for order in SEEDS if device.name == "simulator" else SEEDS[:1]:
        with device.active(seed=order):
            results.append(mfa.attention(*moved, **terms, return_lse=True))
    out, lse = (result.cpu() for result in results[0])

    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    assert out.shape == expected[0].shape
    assert lse.shape == expected[1].shape
    few = scores.numel() < 512
    tolerances = [
        oracle.tolerance(plain[0], expected[0], summands=summands if few or out.numel() < 512 else None),
        oracle.tolerance(plain[1], expected[1], summands=lse_summands if few or lse.numel() < 512 else None),
    ]
    assert oracle.largest_error(out, expected[0]) <= tolerances[0]
    assert oracle.largest_error(lse, expected[1]) <= tolerances[1]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


def oracle_terms(terms: dict[str, Any]) -> dict[str, Any]:
    mask = terms["attn_mask"]
    rest = {name: term for name, term in terms.items() if name not in ("attn_mask", "enable_gqa")}
    return {**rest, "bias": mask if mask is None else mask[(None,) * (4 - mask.dim())]}


@pytest.mark.parametrize("shard", shards(12, 6))
def test_random_problems(device: Device, shard: int) -> None:
    strategy = problems(dtypes=DTYPES if device.has_kernels else (*DTYPES, torch.float64))

    @seed(shard)
    @settings(max_examples=45)
    @given(strategy)
    def holds(problem: Problem) -> None:
        check(problem, device)

    holds()


FOUND = {
    "a float32 bias of -1e38 with float64": Problem(
        dtype=torch.float64,
        batch=1,
        key_heads=1,
        group=1,
        query_length=2,
        key_length=8,
        head_dim=1,
        value_dim=1,
        layouts=("contiguous",) * 3,
        window=(None, None),
        is_causal=False,
        scale=None,
        bias=("float32", (False, False, False, True)),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_problems_that_failed_once(name: str) -> None:
    check(FOUND[name], Device("cpu"))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    device: Device, *, batch: int = 2, heads: int = 2, lengths: tuple[int, int] = (40, 50), dtype: Any = torch.float32
) -> list[Tensor]:
    shapes = [(batch, heads, length, 32) for length in (lengths[0], lengths[1], lengths[1])]
    return [normal(*shape, dtype=dtype, seed=i).to(device.type) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(device: Device, dtype: torch.dtype) -> None:
    query, key, value = inputs(device, dtype=dtype)
    with device.active():
        first = mfa.attention(query, key, value, is_causal=True, return_lse=True)
        second = mfa.attention(query, key, value, is_causal=True, return_lse=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_permuting_the_batch_permutes_the_output(device: Device) -> None:
    query, key, value = inputs(device, batch=4)
    order = torch.tensor([2, 0, 3, 1], device=device.type)
    with device.active():
        out = mfa.attention(query, key, value, window=(20, 3))
        permuted = mfa.attention(query[order], key[order], value[order], window=(20, 3))
    torch.testing.assert_close(permuted, out[order], rtol=0, atol=0)


def test_grouped_heads_equal_repeated_ones(device: Device) -> None:
    query, key, value = (normal(1, heads, 33, 32, seed=heads).to(device.type) for heads in (6, 2, 2))
    with device.active():
        grouped = mfa.attention(query, key, value, enable_gqa=True)
        repeated = mfa.attention(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))
    torch.testing.assert_close(grouped, repeated, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_nan_in_a_query_stays_in_its_row(device: Device, dtype: torch.dtype, is_causal: bool) -> None:
    query, key, value = inputs(device, dtype=dtype)
    with device.active():
        clean = mfa.attention(query, key, value, is_causal=is_causal, return_lse=True)
        query[1, 0, 17, 5] = math.nan
        out, lse = mfa.attention(query, key, value, is_causal=is_causal, return_lse=True)
    assert out[1, 0, 17].isnan().all()
    assert lse[1, 0, 17].isnan()
    others = torch.ones(lse.shape, dtype=torch.bool)
    others[1, 0, 17] = False
    assert torch.equal(out.cpu()[others], clean[0].cpu()[others])
    assert torch.equal(lse.cpu()[others], clean[1].cpu()[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 3, 15])
def test_nan_in_a_query_of_few_keys(device: Device, dtype: torch.dtype, is_causal: bool, length: int) -> None:
    """As of many: ATen's own kernel for the CPU gives 0 there."""
    query, key, value = (torch.randn(1, 2, length, 16).to(dtype).to(device.type) for _ in range(3))
    query[0, 1, -1, 3] = math.nan
    with device.active():
        out, lse = mfa.attention(query, key, value, is_causal=is_causal, return_lse=True)
    lost = torch.zeros(1, 2, length, dtype=torch.bool)
    lost[0, 1, -1] = True
    assert torch.equal(out.cpu().isnan(), lost[..., None].expand(out.shape))
    assert torch.equal(lse.cpu().isnan(), lost)


@pytest.mark.parametrize(
    ("window", "unseen"),
    [
        ((None, -45), slice(0, 35)),  # row i sees j <= i + 10 - 45
        ((-35, None), slice(5, 40)),  # row i sees j >= i + 10 + 35
        ((5, -10), slice(0, 40)),  # an empty window
        ((None, -100), slice(0, 40)),
    ],
)
def test_rows_that_see_nothing(device: Device, window: tuple[int | None, int | None], unseen: slice) -> None:
    query, key, value = inputs(device, lengths=(40, 50))
    with device.active():
        out, lse = mfa.attention(query, key, value, window=window, return_lse=True)
    empty = torch.zeros(40, dtype=torch.bool)
    empty[unseen] = True
    assert (out.cpu()[:, :, empty] == 0).all()
    assert (lse.cpu()[:, :, empty] == -math.inf).all()
    assert lse.cpu()[:, :, ~empty].isfinite().all()


def test_no_keys_and_no_queries(device: Device) -> None:
    with device.active():
        out, lse = mfa.attention(*inputs(device, lengths=(5, 0)), return_lse=True)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        out, lse = mfa.attention(*inputs(device, lengths=(0, 5)), return_lse=True)
        assert out.shape == (2, 2, 0, 32)
        assert lse.shape == (2, 2, 0)
        for sizes in ({"batch": 0}, {"heads": 0}):
            assert mfa.attention(*inputs(device, **sizes)).numel() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_float16_gives_no_nan(device: Device, sign: int) -> None:
    query, key, value = inputs(device, lengths=(64, 70), dtype=torch.float16)
    largest = torch.finfo(torch.float16).max
    query, key = (tensor.abs().clamp(max=2) * (largest / 2) for tensor in (query, key))
    expected, plain = (f(query.cpu() * sign, key.cpu(), value.cpu()) for f in (oracle.attention, oracle.composition))
    with device.active():
        out, lse = mfa.attention(query * sign, key, value, return_lse=True)
    assert lse.isfinite().all()
    assert oracle.largest_error(out.cpu(), expected[0]) <= oracle.tolerance(plain[0], expected[0])


def test_large_scores_choose_one_key(device: Device) -> None:
    query, key, value = inputs(device, lengths=(9, 12))
    query[..., :] = 0
    query[..., 0] = 1e18
    key[..., 0] = torch.arange(12.0, device=device.type) * 1e18  # scores up to 2e36
    with device.active():
        out, lse = mfa.attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, value[:, :, -1:].expand_as(out), rtol=0, atol=0)
    assert lse.isfinite().all()


def test_output_is_laid_out_as_the_query(device: Device) -> None:
    query, key, value = inputs(device)
    blhd = query.transpose(1, 2).contiguous().transpose(1, 2)
    with device.active():
        for tensor, expected in ((query, query), (blhd, blhd)):
            out, lse = mfa.attention(tensor, key, value, return_lse=True)
            assert out.stride() == expected.stride()
            assert lse.is_contiguous()


def test_rank_3_and_broadcast_leading_dimensions(device: Device) -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    shapes = [
        ((4, 9, 16), (4, 7, 16), (4, 7, 16)),
        ((4, 9, 16), (1, 7, 16), (4, 7, 16)),
        ((2, 4, 9, 16), (4, 7, 16), (1, 4, 7, 16)),
        ((1, 4, 9, 16), (2, 4, 7, 16), (1, 1, 7, 16)),
        ((2, 1, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
        ((2, 1, 9, 16), (1, 1, 7, 16), (1, 4, 7, 8)),
    ]
    for tensors in shapes:
        query, key, value = (normal(*shape, seed=i) for i, shape in enumerate(tensors))
        expected = sdpa(query.double(), key.double(), value.double())
        with device.active():
            out, lse = mfa.attention(*(x.to(device.type) for x in (query, key, value)), return_lse=True)
        assert out.shape == expected.shape
        assert lse.shape == expected.shape[:-1]
        torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=5e-6)


def test_windows_beyond_the_lengths_are_open(device: Device) -> None:
    query, key, value = inputs(device)
    with device.active():
        expected = mfa.attention(query, key, value)
        for far in (1000, 2**31, 2**40, 2**62):
            assert torch.equal(mfa.attention(query, key, value, window=(far, far)), expected)


def test_causal_and_window_together_see_the_intersection(device: Device) -> None:
    query, key, value = inputs(device, lengths=(40, 50))
    with device.active():
        both = mfa.attention(query, key, value, is_causal=True, window=(20, None))
        same = mfa.attention(query, key, value, window=(20, -10))
        wide = mfa.attention(query, key, value, is_causal=True, window=(20, 5))
    assert torch.equal(both, same)
    assert torch.equal(wide, same)


def test_inputs_are_not_modified(device: Device) -> None:
    tensors = inputs(device)
    copies = [tensor.clone() for tensor in tensors]
    with device.active():
        mfa.attention(*tensors, is_causal=True, window=(3, 3))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("transposed", [False, True], ids=["B,H,L,D", "B,L,H,D"])
def test_a_result_changed_in_place_is_torchs_own_error(transposed: bool, device: Device) -> None:
    """As for any op whose backward pass needs its result: no error about views, and none without a backward pass."""
    query = torch.randn(1, 2, 5, 32, device=device.type, requires_grad=True)
    if transposed:
        query = torch.randn(1, 5, 2, 32, device=device.type, requires_grad=True).transpose(1, 2)
    with device.active():
        out = mfa.attention(query, query, query)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
