"""mfa.attention_with_kv_cache and mfa.quantize_kv against float64, and what has to hold exactly."""

import math
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from hypothesis import given, seed, settings
from serving import (
    DTYPES,
    Cached,
    cached_problems,
    dense_terms,
    dequantized,
    live,
    moved,
    normal,
)
from torch import Tensor

import mfa

CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}
CPU = Device("cpu")
INT32 = torch.int32
MASK = torch.ones(1, 1, 2, 3, dtype=torch.bool)


def call(named: dict[str, Any], device: Device, order: int = 0) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The arguments after the call, and the results, on the CPU."""
    there = {name: moved(x, device).clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    with device.active(seed=order):
        out, lse = mfa.attention_with_kv_cache(**there, return_lse=True)
    return {name: moved(x, CPU) for name, x in there.items()}, (out.cpu(), lse.cpu())


def as_bits(tensor: Tensor) -> Tensor:
    """Of a float8 tensor, which few operations know."""
    return tensor.view(torch.uint8) if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor


def rounding(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of 8-bit numbers times their scale: half a step, of a number or of the smallest ones."""
    if dtype == torch.int8:
        return 1.001 * scale / 2
    relative, least = (1 / 16, 2**-10) if dtype == torch.float8_e4m3fn else (1 / 8, 2**-17)
    return 1.001 * (tensor.abs() * relative).maximum(scale * least)


def check_appended(problem: Cached, before: dict[str, Any], after: dict[str, Any]) -> None:
    """New tokens are where they belong, exactly or as well as 8 bits can say; nothing else has changed."""
    new = problem.new or 0
    expected = {name: None if before[name] is None else before[name].clone() for name in CACHES}
    table = before.get("block_table")
    for side, kept in zip(("key", "value"), problem.formats, strict=True) if new else ():
        scales = after[f"{side}_scale"]
        for entry, length in enumerate(problem.lengths):
            slots = range(length, length + new)
            appended = dequantized(after[f"{side}_cache"], scales, table, problem.row(entry), slots).double()
            wanted = before[side][entry].double()
            error = (appended - wanted).abs()
            if kept is None:
                assert (error == 0).all()
            else:
                assert (error <= rounding(wanted, wanted.abs().amax(-1, keepdim=True) / LARGEST[kept], kept)).all()
            for name in (f"{side}_cache", f"{side}_scale"):
                for t in slots if expected[name] is not None else ():
                    place = (
                        (problem.row(entry), t)
                        if table is None
                        else (int(table[entry, t // problem.page]), t % problem.page)
                    )
                    expected[name][place[0], :, place[1]] = after[name][place[0], :, place[1]]
    for name in CACHES:
        if expected[name] is not None:
            bits = (as_bits(x) for x in (after[name], expected[name]))
            torch.testing.assert_close(*bits, rtol=0, atol=0, equal_nan=True)
    for name in (
        "query",
        "key",
        "value",
        "cache_seqlens",
        "block_table",
        "cache_batch_idx",
        "cache_leftpad",
        "attn_mask",
    ):
        if isinstance(before.get(name), Tensor):
            assert torch.equal(after[name], before[name])


def check(problem: Cached, device: Device) -> None:
    """The numerics rule; the caches' new contents; and the same result in whatever order of execution."""
    named = problem.arguments()
    results = [call(named, device, order) for order in ((0, 1) if device.name == "simulator" else (0,))]
    after, (out, lse) = results[0]
    check_appended(problem, named, after)
    terms = {name: named[name] for name in ("window", "is_causal", "scale", "softcap")}
    terms |= {name: named[name] for name in ("sinks", "alibi_slopes") if name in named}
    expected, plain = [], []
    for entry in range(len(problem.lengths)):
        live, table, row = problem.live(entry), named.get("block_table"), problem.row(entry)
        keys, values = (
            dequantized(after[f"{side}_cache"], after[f"{side}_scale"], table, row, live)[None]
            for side in ("key", "value")
        )
        tensors, own = (named["query"][entry, None], keys, values), dense_terms(terms, entry)
        if problem.masked is not None:
            mask = named["attn_mask"][entry if problem.mask_sizes[0] else 0]
            whole_mask = torch.ones(*mask.shape[:2], len(live), dtype=torch.bool)
            whole_mask[..., len(live) - problem.masked :] = mask
            own["bias"] = whole_mask[None]
        expected.append(oracle.attention(*tensors, **own))
        plain.append(oracle.composition(*(x.to(problem.dtype) for x in tensors), **own))
    whole = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for pairs in (expected, plain)]
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    for actual, reference, torchs in zip((out, lse), *whole, strict=True):
        assert actual.shape == reference.shape
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(torchs, reference)
    for _, other in results[1:]:
        torch.testing.assert_close(other, (out, lse), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shard", range(8))
def test_random_problems(device: Device, shard: int) -> None:
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)

    @seed(shard)
    @settings(max_examples=30)
    @given(cached_problems(dtypes=dtypes))
    def holds(problem: Cached) -> None:
        check(problem, device)

    holds()


def problem(**options: Any) -> Cached:
    defaults = {"dtype": torch.float32, "formats": (None, None), "key_heads": 2, "group": 2, "lengths": (5, 0, 30)}
    return Cached(**{**defaults, "query_length": 2, "new": 2, "page": None, "dims": (16, 16), **options})


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_the_number_of_splits_changes_rounding_only(
    device: Device, page: int | None, cache_dtype: torch.dtype | None
) -> None:
    named = problem(page=page, formats=(cache_dtype,) * 2, lengths=(90, 3, 200), query_length=1, new=1).arguments()
    whole = call({**named, "num_splits": 1}, device)[1]
    for splits in (0, 2, 3, 7, 1000):
        torch.testing.assert_close(call({**named, "num_splits": splits}, device)[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [8, 16, 40])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_paged_equals_dense(device: Device, page: int, cache_dtype: torch.dtype | None) -> None:
    options = {"dims": (64, 64), "formats": (cache_dtype,) * 2, "lengths": (37, 8, 0, 39)}
    paged = problem(page=page, **options)
    named = paged.arguments()
    dense = dict(named)
    table = dense.pop("block_table")
    for name in CACHES:
        if named[name] is not None:
            dense[name] = torch.zeros(4, 2, paged.capacity, *named[name].shape[3:]).to(named[name].dtype)
            for entry, length in enumerate(paged.lengths):
                dense[name][entry, :, :length] = live(named[name], table, entry, range(length))
    torch.testing.assert_close(call(named, device)[1], call(dense, device)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_tree_that_is_a_line_equals_causal_bitwise(device: Device, is_causal: bool) -> None:
    named = problem(dtype=torch.float16, lengths=(70, 3, 600), query_length=6, new=6, dims=(64, 64)).arguments()
    causal = call(named, device)[1]
    line = {**named, "attn_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(), "is_causal": is_causal}
    torch.testing.assert_close(call(line, device)[1], causal, rtol=0, atol=0)


def test_drafted_tokens_see_their_branch(device: Device) -> None:
    """Two branches of two tokens, in one call, as each of them alone."""
    tree = problem(dtype=torch.float32, lengths=(20, 5, 0), query_length=4, new=4).arguments()
    branches = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    out, _ = call({**tree, "attn_mask": branches[None, None]}, device)[1]
    for branch in (slice(0, 2), slice(2, 4)):
        alone = {name: tree[name][:, :, branch].contiguous() for name in ("query", "key", "value")}
        # Positions differ from those in the tree: neither windows nor ALiBi here.
        torch.testing.assert_close(out[:, :, branch], call({**tree, **alone}, device)[1][0], rtol=1e-5, atol=1e-5)


def test_pages_may_be_shared(device: Device) -> None:
    """A common prefix is stored once, and each entry goes on in a page of its own."""
    keys, values = (normal(4, 2, 8, 16, seed=i) for i in (0, 1))
    new = [normal(2, 2, 1, 16, seed=i) for i in (2, 3)]
    table = torch.tensor([[3, 1, -1], [3, 0, -1]], dtype=INT32)
    named = {"query": normal(2, 4, 1, 16, seed=4), "cache_seqlens": torch.tensor([8, 10], dtype=INT32)}
    _, (out, _) = call(
        {**named, "key_cache": keys, "value_cache": values, "key": new[0], "value": new[1], "block_table": table},
        device,
    )
    for entry, pages in enumerate(((3,), (3, 0))):
        own = [
            torch.cat([*(cache[page] for page in pages)], dim=1)[:, : int(named["cache_seqlens"][entry])]
            for cache in (keys, values)
        ]
        own = [torch.cat([old, fresh[entry]], dim=1)[None] for old, fresh in zip(own, new, strict=True)]
        expected = oracle.attention(named["query"][entry, None], *own)[0]
        torch.testing.assert_close(out[entry, None].double(), expected, rtol=0, atol=2e-6)


def test_two_runs_are_bitwise_equal_and_order_of_the_batch_does_not_matter(device: Device) -> None:
    named = problem(page=8, lengths=(70, 9, 33), new=None).arguments()
    first, second = call(named, device)[1], call(named, device)[1]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    order = torch.tensor([2, 0, 1])
    other = {name: named[name][order] for name in ("query", "cache_seqlens", "block_table")}
    permuted = call({**named, **other}, device)[1]
    torch.testing.assert_close(permuted, tuple(x[order] for x in first), rtol=0, atol=0)


def test_one_entrys_nan_stays_there(device: Device) -> None:
    named = problem(lengths=(20, 25, 30), new=None).arguments()
    clean = call(named, device)[1]
    named["key_cache"][1, :, :25] = math.nan
    named["value_cache"][1, :, :25] = math.nan
    out, lse = call(named, device)[1]
    assert out[1].isnan().all()
    keep = torch.tensor([0, 2])
    assert torch.equal(out[keep], clean[0][keep])
    assert torch.equal(lse[keep], clean[1][keep])


@pytest.mark.parametrize("cache_seqlens", [0, 11])
def test_one_length_for_all(device: Device, cache_seqlens: int) -> None:
    named = problem(lengths=(cache_seqlens,) * 3).arguments()
    expected = call(named, device)[1]
    torch.testing.assert_close(call({**named, "cache_seqlens": cache_seqlens}, device)[1], expected, rtol=0, atol=0)


def test_an_empty_cache_and_empty_batches(device: Device) -> None:
    named = problem(lengths=(0, 0), new=None).arguments()
    out, lse = call(named, device)[1]
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    sinks = normal(4)
    assert torch.equal(call({**named, "sinks": sinks}, device)[1][1], sinks[:, None].expand(2, 4, 2))
    named = problem().arguments()
    empty = {name: x[:0] if isinstance(x, Tensor) else x for name, x in named.items()}
    assert call(empty, device)[1][0].shape == (0, 4, 2, 16)
    rowless = {**named, "query": named["query"][:, :, :0]}
    assert call(rowless, device)[1][0].shape == (3, 4, 0, 16)


def test_caches_may_have_any_strides(device: Device) -> None:
    """[B,L,H,D] memory, as static caches of other libraries have it; and one tensor for keys and values."""
    named = problem(dims=(16, 16)).arguments()
    expected_after, expected = call(named, device)
    both = torch.stack([named["key_cache"], named["value_cache"]]).transpose(2, 3).contiguous().to(device.type)
    keys, values = (cache.transpose(1, 2) for cache in both)
    there = {name: moved(x, device) for name, x in {**named, "key_cache": keys, "value_cache": values}.items()}
    with device.active():
        out, lse = mfa.attention_with_kv_cache(**there, return_lse=True)
    torch.testing.assert_close((out.cpu(), lse.cpu()), expected, rtol=1e-6, atol=1e-6)
    for cache, name in ((keys, "key_cache"), (values, "value_cache")):
        torch.testing.assert_close(cache.cpu(), expected_after[name], rtol=0, atol=0, equal_nan=True)


def test_prefill_in_chunks_equals_the_whole(device: Device) -> None:
    query, key, value = normal(2, 4, 50, 16), normal(2, 2, 50, 16, seed=1), normal(2, 2, 50, 16, seed=2)
    caches = [torch.full((2, 2, 64, 16), math.nan, device=device.type) for _ in range(2)]
    outs, done = [], 0
    with device.active():
        for chunk in (17, 32, 1):
            rows = slice(done, done + chunk)
            parts = [moved(x[:, :, rows], device) for x in (query, key, value)]
            outs.append(mfa.attention_with_kv_cache(parts[0], *caches, *parts[1:], cache_seqlens=done).cpu())
            done += chunk
    expected = oracle.attention(query, key, value, is_causal=True)[0]
    plain = oracle.composition(query, key, value, is_causal=True)[0]
    assert oracle.largest_error(torch.cat(outs, dim=2), expected) <= oracle.tolerance(plain, expected)


# -- quantization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize(dtype: torch.dtype, source: torch.dtype) -> None:
    tensor = (normal(3, 2, 9, 40) * normal(9, 1, seed=1).exp()).to(source)
    quantized, scale = mfa.quantize_kv(tensor, dtype)
    assert quantized.dtype == dtype
    assert quantized.shape == tensor.shape
    assert scale.dtype == torch.float32
    assert scale.shape == tensor.shape[:-1]
    largest = tensor.double().abs().amax(-1)
    torch.testing.assert_close(scale.double() * LARGEST[dtype], largest, rtol=1e-6, atol=0)
    error = (quantized.double() * scale.double()[..., None] - tensor.double()).abs()
    assert (error <= rounding(tensor.double(), scale.double()[..., None], dtype)).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_quantize_odd_tokens(dtype: torch.dtype) -> None:
    tensor = normal(1, 1, 6, 8)
    tensor[0, 0, 0] = 0
    tensor[0, 0, 1, 3] = math.nan
    tensor[0, 0, 2, 3] = math.inf
    tensor[0, 0, 3] = 1e-45
    tensor[0, 0, 4] = tensor[0, 0, 4] / tensor[0, 0, 4].abs().max() * 3e38
    quantized, scale = mfa.quantize_kv(tensor, dtype)
    back = (quantized.float() * scale[..., None])[0, 0]
    assert (back[0] == 0).all()
    assert back[1].isnan().all()
    assert back[2].isnan().all()
    assert back[3].abs().max() <= 1e-38
    assert oracle.largest_error(back[4:], tensor[0, 0, 4:]) <= 3e38 / (8 if dtype == torch.float8_e5m2 else 16)
    assert back[4:].isfinite().all()


def test_quantize_refuses() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch.uint8; it must be int8, float8_e4m3fn or float8_e5m2"):
        mfa.quantize_kv(normal(2, 3), torch.uint8)
    with pytest.raises(TypeError, match="tensor has dtype int64"):
        mfa.quantize_kv(torch.arange(3))


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "change", "error", "words"),
    [
        ({}, {"cache_seqlens": torch.tensor([5, 0, 30])}, TypeError, "cache_seqlens has dtype int64; it must be int32"),
        (
            {},
            {"cache_seqlens": torch.tensor([5, 0, 34], dtype=INT32)},
            ValueError,
            "has 34 and 2 new tokens at 2; .* 35",
        ),
        ({}, {"cache_seqlens": torch.tensor([5, -1, 0], dtype=INT32)}, ValueError, "cache_seqlens has -1 and 2 new"),
        ({}, {"cache_seqlens": torch.tensor([5, 0], dtype=INT32)}, ValueError, "cache_seqlens has shape \\[2\\]"),
        ({}, {"cache_seqlens": 34}, ValueError, "cache_seqlens has 34 and 2 new tokens"),
        ({}, {"cache_seqlens": -1}, ValueError, "cache_seqlens is -1"),
        ({}, {"cache_seqlens": 3.0}, TypeError, "cache_seqlens is 3.0; it must be an integer"),
        ({"new": None}, {"cache_seqlens": 34}, ValueError, "cache_seqlens has 34 tokens at 0; .* within 0 ... 33"),
        ({}, {"value": None}, ValueError, "value is None, and key is given"),
        ({}, {"key": normal(3, 2, 3, 16)}, ValueError, "value has shape \\[3, 2, 2, 16\\]"),
        ({}, {"key": normal(3, 4, 2, 16)}, ValueError, "key has shape \\[3, 4, 2, 16\\]; .* = \\[3, 2, 2, 16\\]"),
        ({}, {"key": normal(3, 2, 2, 16).half()}, TypeError, "key has dtype float16; it must be float32"),
        ({}, {"query": normal(4, 2, 16)}, ValueError, "query has 3 dimensions; it must have 4"),
        ({}, {"query": normal(3, 3, 2, 16)}, ValueError, "query has 3 heads; .* those of key_cache, 2"),
        ({}, {"query": normal(3, 4, 2, 8)}, ValueError, "key_cache has head dimension 16; .* of query, 8"),
        ({}, {"query": normal(2, 4, 2, 16)}, ValueError, "key_cache has batch size 3; .* of query, 2"),
        (
            {},
            {"query": normal(3, 4, 2, 16).half()},
            TypeError,
            "key_cache has dtype float32; it must be float16 or int8",
        ),
        ({}, {"value_cache": normal(3, 2, 34, 16)}, ValueError, "value_cache has shape \\[3, 2, 34\\]"),
        ({}, {"value_cache": normal(3, 2, 35, 16).half()}, TypeError, "value_cache has dtype float16"),
        ({}, {"key_scale": normal(3, 2, 35)}, ValueError, "key_scale is given for a key_cache of float32"),
        ({}, {"sinks": normal(5)}, ValueError, "sinks has shape \\[5\\]"),
        ({}, {"alibi_slopes": normal(2, 4)}, ValueError, "alibi_slopes has shape \\[2, 4\\]; .* = \\[3, 4\\]"),
        ({}, {"num_splits": -1}, ValueError, "num_splits is -1"),
        ({}, {"num_splits": 1.5}, TypeError, "num_splits is 1.5"),
        ({}, {"softcap": math.inf}, ValueError, "softcap is inf"),
        ({}, {"query": normal(3, 4, 2, 16).requires_grad_()}, NotImplementedError, "query requires grad, .*no_grad"),
        (
            {"formats": (torch.int8, torch.int8)},
            {"key_scale": None},
            ValueError,
            "key_scale is None; .* int8 key_cache",
        ),
        ({"formats": (torch.int8, torch.int8)}, {"value_scale": normal(3, 2, 34)}, ValueError, "value_scale has shape"),
        (
            {"formats": (torch.int8, torch.int8)},
            {"value_scale": normal(3, 2, 35).half()},
            TypeError,
            "value_scale has dtype float16",
        ),
        ({"page": 8}, {"block_table": torch.zeros(3, 4)}, TypeError, "block_table has dtype float32; it must be int32"),
        ({"page": 8}, {"block_table": torch.zeros(2, 4, dtype=INT32)}, ValueError, "block_table has shape \\[2, 4\\]"),
        (
            {"page": 8},
            {"block_table": torch.full((3, 4), 14, dtype=INT32)},
            ValueError,
            "has page 14 at \\[0, 0\\]; .* 13",
        ),
        ({"page": 8}, {"block_table": torch.full((3, 4), -1, dtype=INT32)}, ValueError, "has page -1 at \\[0, 0\\]"),
        (
            {"page": 8, "lengths": (8, 9, 30)},
            {"block_table": torch.arange(4, dtype=INT32).expand(3, 4)},
            ValueError,
            "has page 1 for entries 0 and 1, which append to the same slot",
        ),
        (
            {"page": 8},
            {"cache_batch_idx": torch.zeros(3, dtype=INT32)},
            ValueError,
            "cache_batch_idx is given, and block",
        ),
        (
            {"page": 8},
            {"cache_leftpad": torch.zeros(3, dtype=INT32)},
            NotImplementedError,
            "cache_leftpad is given, and",
        ),
        ({}, {"cache_batch_idx": torch.zeros(2, dtype=INT32)}, ValueError, "cache_batch_idx has shape \\[2\\]"),
        ({}, {"cache_batch_idx": torch.zeros(3)}, TypeError, "cache_batch_idx has dtype float32; it must be int32"),
        ({}, {"cache_batch_idx": torch.tensor([0, 1, 3], dtype=INT32)}, ValueError, "has row 3 at 2; .* 0 ... 2"),
        (
            {"lengths": (5, 5, 30)},
            {"cache_batch_idx": torch.tensor([1, 1, 2], dtype=INT32)},
            ValueError,
            "cache_batch_idx has row 1 for entries 0 and 1, which append to the same slot",
        ),
        ({}, {"cache_leftpad": torch.zeros(3, 1, dtype=INT32)}, ValueError, "cache_leftpad has shape \\[3, 1\\]"),
        ({}, {"cache_leftpad": torch.zeros(3)}, TypeError, "cache_leftpad has dtype float32; it must be int32"),
        (
            {},
            {"cache_leftpad": torch.tensor([6, 0, 0], dtype=INT32)},
            ValueError,
            "cache_leftpad is 6 at 0; .* 0 ... 5",
        ),
        ({}, {"cache_leftpad": torch.tensor([0, 0, -1], dtype=INT32)}, ValueError, "cache_leftpad is -1 at 2"),
        ({}, {"attn_mask": torch.ones(1, 1, 2, 2)}, TypeError, "attn_mask has dtype float32; it must be bool"),
        ({}, {"attn_mask": MASK[0]}, ValueError, "attn_mask has 3 dimensions; it must have 4"),
        (
            {},
            {"attn_mask": MASK[:, :, :1]},
            ValueError,
            "attn_mask has shape \\[1, 1, 1, 3\\]; .* = \\[3, 4, 2\\] and K",
        ),
        ({}, {"attn_mask": MASK.expand(1, 2, 2, 3)}, ValueError, "attn_mask has shape \\[1, 2, 2, 3\\]"),
        ({}, {"attn_mask": MASK}, ValueError, "attn_mask is over 3 tokens; it must be over at most 2, as live at 1"),
        (
            {"page": 8},
            {"key_cache": normal(14, 2, 12, 16), "value_cache": normal(14, 2, 12, 16)},
            ValueError,
            "key_cache has pages of 12 tokens; it must be a multiple of 8",
        ),
    ],
)
def test_refused(options: dict[str, Any], change: dict[str, Any], error: type[Exception], words: str) -> None:
    named = problem(**options).arguments()
    before = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    with pytest.raises(error, match=words):
        mfa.attention_with_kv_cache(**{**named, **change})
    for name in CACHES:  # refused before any work
        if named[name] is not None and named[name].dtype != torch.float8_e4m3fn:
            torch.testing.assert_close(named[name], before[name], rtol=0, atol=0, equal_nan=True)
    mfa.attention_with_kv_cache(**named)


def test_more_new_tokens_than_the_cache_has_room() -> None:
    named = problem(lengths=(0,), new=1).arguments()
    named["key"], named["value"] = (normal(1, 2, 5, 16) for _ in range(2))
    with pytest.raises(ValueError, match="key has length 5; it must be at most the capacity of the cache, 4"):
        mfa.attention_with_kv_cache(**named)


# -- what the kernels cost ------------------------------------------------------------------------------------------


def read_bytes(cache_dtype: torch.dtype | None) -> tuple[int, int]:
    """What a step of decoding reads, with eight query heads per key head; and the live bytes of a float16 cache."""
    step = problem(
        dtype=torch.float16,
        formats=(cache_dtype,) * 2,
        key_heads=2,
        group=8,
        lengths=(500, 700),
        query_length=1,
        new=None,
        dims=(128, 128),
    )
    with mfa.simulate() as simulation:
        mfa.attention_with_kv_cache(**step.arguments())
    return simulation.counters.device_read_bytes, 2 * 2 * sum(step.lengths) * 128 * 2


def test_each_key_and_value_is_read_once_for_its_group(device: Device) -> None:
    if device.name != "simulator":
        pytest.skip("only the simulator counts")
    read, live_bytes = read_bytes(None)
    assert read <= 1.1 * live_bytes
    assert read_bytes(torch.int8)[0] <= 0.6 * read
