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
    tolerances,
)
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import mfa

CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
CPU = Device("cpu")
INT32 = torch.int32


def call(named: dict[str, Any], device: Device, order: int = 0) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The arguments after the call, and the results, on the CPU."""
    there = {name: moved(x, device).clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    with device.active(seed=order):
        out, lse = mfa.attention_with_kv_cache(**there, return_lse=True)
    return {name: moved(x, CPU) for name, x in there.items()}, (out.cpu(), lse.cpu())


def check_appended(problem: Cached, before: dict[str, Any], after: dict[str, Any]) -> None:
    """New tokens are where they belong, exactly or as well as 8 bits can say; nothing else has changed."""
    new = problem.new or 0
    expected = {name: None if before[name] is None else before[name].clone() for name in CACHES}
    table = before.get("block_table")
    for side in ("key", "value") if new else ():
        scales = after[f"{side}_scale"]
        for entry, length in enumerate(problem.lengths):
            appended = dequantized(after[f"{side}_cache"], scales, table, entry, length + new)[:, length:].double()
            wanted = before[side][entry].double()
            error = (appended - wanted).abs()
            if problem.cache_dtype is None:
                assert (error == 0).all()
            else:
                scale = wanted.abs().amax(-1, keepdim=True) / LARGEST[problem.cache_dtype]
                step = scale / 2 if problem.cache_dtype == torch.int8 else (wanted.abs() / 16).maximum(scale / 1024)
                assert (error <= 1.001 * step).all()
            for name in (f"{side}_cache", f"{side}_scale"):
                for t in range(length, length + new) if expected[name] is not None else ():
                    place = (entry, t) if table is None else (int(table[entry, t // problem.page]), t % problem.page)
                    expected[name][place[0], :, place[1]] = after[name][place[0], :, place[1]]
    for name in CACHES:
        if expected[name] is not None:
            bits = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (after[name], expected[name]))
            torch.testing.assert_close(*bits, rtol=0, atol=0, equal_nan=True)
    for name in ("query", "key", "value", "cache_seqlens", "block_table"):
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
    sequences, expected, plain = [], [], []
    for entry, length in enumerate(problem.lengths):
        total, table = length + (problem.new or 0), named.get("block_table")
        keys, values = (
            dequantized(after[f"{side}_cache"], after[f"{side}_scale"], table, entry, total)[None]
            for side in ("key", "value")
        )
        tensors, own = (named["query"][entry, None], keys, values), dense_terms(terms, entry)
        expected.append(oracle.attention(*tensors, **own))
        plain.append(oracle.composition(*(x.to(problem.dtype) for x in tensors), **own))
        sequences.append((tensors, own))
    scale = 1 / math.sqrt(problem.dims[0]) if problem.scale is None else problem.scale
    whole = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for pairs in (expected, plain)]
    allowed = tolerances(scale, problem.dtype, sequences, whole[1], whole[0])
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    for actual, reference, tolerance in zip((out, lse), whole[0], allowed, strict=True):
        assert actual.shape == reference.shape
        assert oracle.largest_error(actual, reference) <= tolerance
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
    defaults = {"dtype": torch.float32, "cache_dtype": None, "key_heads": 2, "group": 2, "lengths": (5, 0, 30)}
    return Cached(**{**defaults, "query_length": 2, "new": 2, "page": None, "dims": (16, 16), **options})


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_the_number_of_splits_changes_rounding_only(
    device: Device, page: int | None, cache_dtype: torch.dtype | None
) -> None:
    named = problem(page=page, cache_dtype=cache_dtype, lengths=(90, 3, 200), query_length=1, new=1).arguments()
    whole = call({**named, "num_splits": 1}, device)[1]
    for splits in (0, 2, 3, 7, 1000):
        torch.testing.assert_close(call({**named, "num_splits": splits}, device)[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page", [8, 16, 40])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_paged_equals_dense(device: Device, page: int, cache_dtype: torch.dtype | None) -> None:
    options = {"dims": (64, 64), "cache_dtype": cache_dtype, "lengths": (37, 8, 0, 39)}
    paged = problem(page=page, **options)
    named = paged.arguments()
    dense = dict(named)
    table = dense.pop("block_table")
    for name in CACHES:
        if named[name] is not None:
            dense[name] = torch.zeros(4, 2, paged.capacity, *named[name].shape[3:]).to(named[name].dtype)
            for entry, length in enumerate(paged.lengths):
                dense[name][entry, :, :length] = live(named[name], table, entry, length)
    torch.testing.assert_close(call(named, device)[1], call(dense, device)[1], rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
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
    step = scale.double()[..., None]
    assert (
        error <= (step / 2 if dtype == torch.int8 else (tensor.double().abs() / 16).maximum(step / 1024)) * 1.001
    ).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
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
    assert oracle.largest_error(back[4:], tensor[0, 0, 4:]) <= 3e38 / 16
    assert back[4:].isfinite().all()


def test_quantize_refuses() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch.uint8; it must be int8 or float8_e4m3fn"):
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
        ({"cache_dtype": torch.int8}, {"key_scale": None}, ValueError, "key_scale is None; .* int8 key_cache"),
        ({"cache_dtype": torch.int8}, {"value_scale": normal(3, 2, 34)}, ValueError, "value_scale has shape"),
        (
            {"cache_dtype": torch.int8},
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


# -- PyTorch's machinery --------------------------------------------------------------------------------------------


def op_arguments(**options: Any) -> tuple[Any, ...]:
    named = problem(new=None, **options).arguments()
    caches = (named[name] for name in ("key_cache", "value_cache"))
    scales = (named[name] for name in ("key_scale", "value_scale"))
    table = named.get("block_table")
    terms = (normal(4), normal(3, 4).abs(), 0.25, 20, 0, 5.0, 2)
    return (named["query"], *caches, named["cache_seqlens"], table, *scales, *terms)


@pytest.mark.parametrize("options", [{}, {"page": 8}, {"page": 8, "cache_dtype": torch.int8}])
def test_opcheck(device: Device, options: dict[str, Any]) -> None:
    with device.active():
        opcheck(torch.ops.mfa.attention_decode.default, tuple(moved(x, device) for x in op_arguments(**options)))


def test_the_op_has_no_gradient() -> None:
    query, *rest = op_arguments()
    out, _ = torch.ops.mfa.attention_decode(query.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="attention over a cache has no gradients"):
        out.sum().backward()


def test_bad_contents_are_refused_by_the_op_as_well() -> None:
    tensors = list(op_arguments(page=8))
    tensors[3] = torch.tensor([5, 0, 33], dtype=INT32)
    with pytest.raises(RuntimeError, match="cache_lengths has 33 tokens at 2"):
        torch.ops.mfa.attention_decode(*tensors)


@pytest.mark.parametrize("options", [{}, {"page": 8, "cache_dtype": torch.int8}])
def test_compile_is_done_once_for_all_lengths(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mfa.attention_with_kv_cache, fullgraph=True, dynamic=True, backend=counter)
    named = problem(lengths=(5, 0, 20), **options).arguments()
    del named["softcap"]  # a float argument becomes a symbol, which torch.compile(dynamic=True) compiles twice for
    if "block_table" in named:
        named["block_table"].copy_(torch.arange(9, dtype=INT32).view(3, 3))
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        if named[name] is not None and named[name].is_floating_point():
            named[name].nan_to_num_()
    other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    for lengths in ((5, 0, 20), (2, 3, 4), (7, 8, 9)):
        seqlens = {"cache_seqlens": torch.tensor(lengths, dtype=INT32)}
        out = step(**{**named, **seqlens})
        torch.testing.assert_close(out, mfa.attention_with_kv_cache(**{**other, **seqlens}))
        for name in CACHES:
            if named[name] is not None:
                assert torch.equal(named[name], other[name])
    assert counter.frame_count == 1


def test_vmap() -> None:
    query, *rest = op_arguments()
    rest[:2] = [cache.nan_to_num() for cache in rest[:2]]
    queries, lengths = normal(2, *query.shape, seed=9), torch.tensor([[5, 0, 30], [1, 2, 3]], dtype=INT32)

    def f(query: Tensor, lengths: Tensor) -> Tensor:
        return torch.ops.mfa.attention_decode(query, *rest[:2], lengths, *rest[3:])[0]

    expected = [f(q, n) for q, n in zip(queries, lengths, strict=True)]
    torch.testing.assert_close(list(torch.vmap(f)(queries, lengths)), expected)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_autocast(cache_dtype: torch.dtype | None) -> None:
    """A cache isn't cast: what meets it is."""
    named = problem(dtype=torch.float16, cache_dtype=cache_dtype).arguments()
    for name in ("query", "key", "value"):
        named[name] = named[name].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mfa.attention_with_kv_cache(**named)
    assert out.dtype == (torch.float16 if cache_dtype is None else torch.bfloat16)


def test_flops_are_those_of_the_live_keys() -> None:
    named = problem().arguments()
    with FlopCounterMode(display=False) as counter:
        mfa.attention_with_kv_cache(**named)
    assert counter.get_total_flops() == 2 * 4 * 2 * (35 + 6) * 32


# -- what the kernels cost ------------------------------------------------------------------------------------------


def read_bytes(cache_dtype: torch.dtype | None) -> tuple[int, int]:
    """What a step of decoding reads, with eight query heads per key head; and the live bytes of a float16 cache."""
    step = problem(
        dtype=torch.float16,
        cache_dtype=cache_dtype,
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


# -- generation -----------------------------------------------------------------------------------------------------


class TinyModel:
    """Two layers of grouped attention over a small vocabulary, with random weights and learned positions."""

    layers, heads, key_heads, dim, vocabulary = 2, 4, 2, 16, 61

    def __init__(self) -> None:
        width = self.heads * self.dim
        self.embedding, self.positions = normal(self.vocabulary, width, seed=1), normal(128, width, seed=2)
        sizes = (width, self.key_heads * self.dim, self.key_heads * self.dim, width)
        self.projections = [
            [normal(width, size, seed=10 * layer + i) / math.sqrt(width) for i, size in enumerate(sizes)]
            for layer in range(1, 1 + self.layers)
        ]

    def run(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """Logits [B,L,vocabulary]; attend(layer, q, k, v) takes and returns [B,H,L,D]."""
        hidden = self.embedding[tokens] + self.positions[positions]
        for layer, (*qkv, out) in enumerate(self.projections):
            normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
            heads = ((normed @ w).unflatten(-1, (-1, self.dim)).transpose(1, 2) for w in qkv)
            hidden = hidden + attend(layer, *heads).transpose(1, 2).flatten(2) @ out
        return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]) @ self.embedding.T


def eager(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    """Everything computed anew for each token, by PyTorch."""

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, is_causal=True, enable_gqa=True)

    tokens = list(prompt)
    for _ in range(count):
        logits = model.run(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("page", [None, 8])
def test_generated_tokens_equal_eagers(device: Device, page: int | None) -> None:
    """64 tokens of a batch of 4 prompts of different lengths: one padded prefill, then a token at a time."""
    model, count, lengths = TinyModel(), 64, (3, 14, 1, 9)
    prompts = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    table, shape = None, (4, model.key_heads, 80, model.dim)
    if page is not None:
        table = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(INT32).view(4, 10).to(device.type)
        shape = (40, model.key_heads, page, model.dim)
    caches = [[torch.full(shape, math.nan, device=device.type) for _ in range(2)] for _ in range(model.layers)]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = [moved(x, device) for x in (query, key, value)]
        with device.active():
            out = mfa.attention_with_kv_cache(
                tensors[0], *caches[layer], *tensors[1:], cache_seqlens=moved(seqlens, device), block_table=table
            )
        return out.cpu()

    # Padding at the right: what it leaves in the caches is overwritten before it counts.
    seqlens = torch.zeros(4, dtype=INT32)
    longest = max(lengths)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    logits = model.run(padded, torch.arange(longest).expand(4, -1), attend)
    tokens = logits[torch.arange(4), torch.tensor(lengths) - 1].argmax(-1, keepdim=True)
    generated = [tokens]
    seqlens = torch.tensor(lengths, dtype=INT32)
    for _ in range(count - 1):
        tokens = model.run(tokens, seqlens[:, None], attend)[:, -1].argmax(-1, keepdim=True)
        generated.append(tokens)
        seqlens = seqlens + 1
    expected = [eager(model, prompt, count) for prompt in prompts]
    assert torch.cat(generated, dim=1).tolist() == expected
    assert len({tuple(line) for line in expected}) == 4  # different prompts say different things
