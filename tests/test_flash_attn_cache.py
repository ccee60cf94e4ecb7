"""flash_attn_with_kvcache with rotary embeddings, leftpad, any batch index; the same of FlashAttention-3."""

import math
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from rotation import rotated
from torch import Tensor

import mfa
from mfa import flash_attn
from mfa.flash_attn import flash_attn_3

HEADS, KEY_HEADS, DIM, NEW, ENTRIES = 4, 2, 16, 3, 4
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02])


class Cache:
    """A cache whose slots without a token are NaN, and tokens to append; in tensors on the CPU."""

    def __init__(self, capacity: int, *, entries: list[int], starts: list[int], ends: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.entries, self.starts, self.ends = entries, starts, ends
        self.k, self.v = (torch.full((ENTRIES, capacity, KEY_HEADS, DIM), math.nan) for _ in range(2))
        for entry, start, end in zip(entries, starts, ends, strict=True):
            for cache in (self.k, self.v):
                cache[entry, start:end] = random(end - start, KEY_HEADS, DIM)
        batch = len(entries)
        self.q = random(batch, NEW, HEADS, DIM)
        self.new_k, self.new_v = random(batch, NEW, KEY_HEADS, DIM), random(batch, NEW, KEY_HEADS, DIM)

    def keys(self, n: int, new_k: Tensor) -> tuple[Tensor, Tensor]:
        """[Lk,Hkv,D] of a batch entry, after appending."""
        live = slice(self.starts[n], self.ends[n])
        entry = self.entries[n]
        return torch.cat((self.k[entry, live].to(new_k), new_k[n])), torch.cat((self.v[entry, live], self.new_v[n]))


def tables(dim: int, positions: int = 40) -> tuple[Tensor, Tensor]:
    angles = torch.rand(positions, dim // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6.3
    return angles.cos().float(), angles.sin().float()


def check(cache: Cache, results: tuple[Tensor, ...], q: Tensor, new_k: Tensor, **terms: Any) -> None:
    """Against float64, from queries and new keys that are rotated already; also what was appended, and where."""
    out, lse, k_after, v_after = (result.cpu() for result in results)
    for n, (entry, end) in enumerate(zip(cache.entries, cache.ends, strict=True)):
        keys, values = cache.keys(n, new_k)
        first = [tensor[None].transpose(1, 2) for tensor in (q[n], keys, values)]
        expected, expected_lse = oracle.attention(*first, **terms)
        plain, plain_lse = oracle.composition(*(tensor.float() for tensor in first), **terms)
        assert oracle.largest_error(out[n : n + 1].transpose(1, 2), expected) <= oracle.tolerance(plain, expected)
        assert oracle.largest_error(lse[n : n + 1], expected_lse) <= oracle.tolerance(plain_lse, expected_lse)
        for before, after, new in ((cache.k, k_after, new_k), (cache.v, v_after, cache.new_v)):
            wanted = before[entry].clone()
            wanted[end : end + NEW] = new[n].float()
            torch.testing.assert_close(after[entry], wanted, equal_nan=True)
    untouched = [entry for entry in range(ENTRIES) if entry not in cache.entries]
    assert k_after[untouched].isnan().all()


def run(device: Device, function: Any, cache: Cache, **arguments: Any) -> tuple[Tensor, ...]:
    there = {name: x.to(device.type) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    k_cache, v_cache = (tensor.clone().to(device.type) for tensor in (cache.k, cache.v))
    with torch.no_grad(), device.active():
        out, lse, *_ = function(
            *(cache.q.to(device.type), k_cache, v_cache, cache.new_k.to(device.type), cache.new_v.to(device.type)),
            **there,
            return_softmax_lse=True,
        )
    return out, lse, k_cache, v_cache


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("dim", "interleaved"), [(16, True), (16, False), (8, True), (8, False)])
@pytest.mark.parametrize("form", ["causal", "window", "open", "leftpad"])
def test_rotary(form: str, dim: int, interleaved: bool, device: Device) -> None:
    starts = [4, 0] if form == "leftpad" else [0, 0]
    cache = Cache(24, entries=[2, 1], starts=starts, ends=[9, 5])
    cos, sin = tables(dim)
    terms = {"causal": {"causal": True}, "window": {"window_size": (4, 1)}}.get(form, {})
    windows = {"causal": (None, 0), "window": (4, 1)}.get(form, (None, None))
    leftpad = {"cache_leftpad": ints(starts)} if form == "leftpad" else {}
    results = run(
        device,
        flash_attn.flash_attn_with_kvcache,
        cache,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        cache_seqlens=ints(cache.ends),
        cache_batch_idx=ints(cache.entries),
        **terms,
        **leftpad,
    )
    rows = torch.tensor(cache.ends)[:, None] + torch.arange(NEW)
    query_rows = rows if terms else rows[:, :1].expand(-1, NEW)
    q = rotated(cache.q, cos, sin, query_rows, interleaved)
    check(cache, results, q, rotated(cache.new_k, cos, sin, rows, interleaved), window=windows)


@pytest.mark.parametrize("form", ["leftpad", "batch index", "both", "one length"])
def test_leftpad_and_batch_index(form: str, device: Device) -> None:
    """Where tokens don't start at slot 0, or an entry isn't a page that the kernels take."""
    starts = [0, 0] if form == "batch index" else [7, 2]
    entries = [0, 1] if form in ("leftpad", "one length") else [3, 1]
    cache = Cache(13, entries=entries, starts=starts, ends=[10, 10] if form == "one length" else [10, 2])
    if entries == [0, 1]:
        cache.k, cache.v = cache.k[:2], cache.v[:2]
    arguments: dict[str, Any] = {"cache_seqlens": 10 if form == "one length" else ints(cache.ends)}
    if form != "batch index":
        arguments["cache_leftpad"] = ints(starts)
    if entries != [0, 1]:
        arguments["cache_batch_idx"] = ints(entries)
    results = run(
        device,
        flash_attn.flash_attn_with_kvcache,
        cache,
        **arguments,
        causal=True,
        window_size=(4, -1),
        softcap=2.0,
        softmax_scale=0.4,
        alibi_slopes=SLOPES,
        num_splits=2,
    )
    if entries == [0, 1]:
        missing = torch.full((2, *cache.k.shape[1:]), math.nan)
        results = (*results[:2], *(torch.cat((tensor.cpu(), missing)) for tensor in results[2:]))
    check(cache, results, cache.q, cache.new_k, window=(4, 0), softcap=2.0, scale=0.4, alibi_slopes=SLOPES)


def test_rotary_over_pages(device: Device) -> None:
    """As over a dense cache, bit for bit."""
    cache = Cache(16, entries=[0, 1], starts=[0, 0], ends=[9, 5])
    cos, sin = tables(16)
    terms: dict[str, Any] = {
        "rotary_cos": cos,
        "rotary_sin": sin,
        "cache_seqlens": ints(cache.ends),
        "causal": True,
        "num_splits": 1,
    }
    dense = Cache(16, entries=[0, 1], starts=[0, 0], ends=[9, 5])
    dense.k, dense.v = dense.k[:2], dense.v[:2]
    expected = run(device, flash_attn.flash_attn_with_kvcache, dense, **terms)
    cache.k, cache.v = (tensor.reshape(ENTRIES * 2, 8, KEY_HEADS, DIM) for tensor in (cache.k, cache.v))
    results = run(
        device, flash_attn.flash_attn_with_kvcache, cache, block_table=torch.tensor([[0, 1], [2, 3]]).int(), **terms
    )
    torch.testing.assert_close(results[:2], expected[:2], rtol=0, atol=0)
    for actual, wanted in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(actual[:4].reshape(wanted.shape), wanted, rtol=0, atol=0, equal_nan=True)


def test_flash_attn_3(device: Device) -> None:
    cache = Cache(24, entries=[2, 1], starts=[0, 0], ends=[9, 5])
    cos, sin = tables(8)
    positions = [20, 3]
    results = run(
        device,
        flash_attn_3.flash_attn_with_kvcache,
        cache,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_seqlens=ints(positions),
        cache_seqlens=ints(cache.ends),
        cache_batch_idx=ints(cache.entries),
        causal=True,
        softcap=2.0,
        pack_gqa=True,
        sm_margin=3,
    )
    rows = torch.tensor(positions)[:, None] + torch.arange(NEW)
    q, new_k = (rotated(x, cos, sin, rows, True) for x in (cache.q, cache.new_k))
    check(cache, results, q, new_k, window=(None, 0), softcap=2.0)


@pytest.mark.simulator
@pytest.mark.parametrize("function", [flash_attn.flash_attn_with_kvcache, flash_attn_3.flash_attn_with_kvcache])
def test_two_launches(function: Any) -> None:
    cache = Cache(13, entries=[3, 1], starts=[4, 2], ends=[9, 5])
    cos, sin = tables(16)
    with mfa.simulate() as simulation:
        function(
            *(cache.q, cache.k, cache.v, cache.new_k, cache.new_v),
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=ints(cache.ends),
            cache_batch_idx=ints(cache.entries),
            cache_leftpad=ints(cache.starts),
            causal=True,
        )
    assert [launch.kernel.split("_")[0] for launch in simulation.launches] == ["append", "decode"]


def test_compiles() -> None:
    cache = Cache(24, entries=[2, 1], starts=[4, 0], ends=[9, 5])
    cos, sin = tables(8)

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        arguments: dict[str, Any] = {"cache_batch_idx": ints([2, 1]), "cache_leftpad": ints([4, 0]), "causal": True}
        out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, lengths, **arguments)
        assert isinstance(out, Tensor)
        return out, k_cache, v_cache

    inputs = (cache.q, cache.k, cache.v, cache.new_k, cache.new_v, ints(cache.ends))
    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), step(*inputs), equal_nan=True)


def test_a_failed_check_leaves_the_cache() -> None:
    cache = Cache(13, entries=[3, 1], starts=[4, 2], ends=[9, 5])
    cos, sin = tables(16)
    good: dict[str, Any] = {
        "cache_seqlens": ints(cache.ends),
        "cache_batch_idx": ints(cache.entries),
        "cache_leftpad": ints(cache.starts),
        "rotary_cos": cos,
        "rotary_sin": sin,
    }
    bad: list[tuple[str, dict[str, Any]]] = [
        ("cache_seqlens has 11 and 3 new", {"cache_seqlens": ints([11, 5])}),
        ("cache_leftpad is 10 at 0", {"cache_leftpad": ints([10, 2])}),
        ("cache_leftpad is -1 at 1", {"cache_leftpad": ints([4, -1])}),
        ("cache_leftpad has shape", {"cache_leftpad": ints([4])}),
        ("cache_batch_idx has row 4 at 0", {"cache_batch_idx": ints([4, 1])}),
        ("append to the same slot", {"cache_batch_idx": ints([1, 1]), "cache_seqlens": ints([5, 5])}),
        ("rotary_sin is None", {"rotary_sin": None}),
        ("rotary_cos is None", {"rotary_cos": None}),
        ("rotary_cos has 10 positions; .* 3 tokens from 9 on", {"rotary_cos": cos[:10], "rotary_sin": sin[:10]}),
        ("block_table too", {"block_table": ints([1, 0])[:, None]}),
        ("softcap", {"softcap": -1.0}),
        ("num_splits", {"num_splits": -1}),
    ]
    k_cache, v_cache = cache.k.clone(), cache.v.clone()
    tensors = (cache.q, k_cache, v_cache, cache.new_k, cache.new_v)
    for message, change in bad:
        with pytest.raises((ValueError, TypeError), match=message):
            flash_attn.flash_attn_with_kvcache(*tensors, **{**good, **change})
    with pytest.raises(ValueError, match="k is None"):
        flash_attn.flash_attn_with_kvcache(*tensors[:3], **good)
    with pytest.raises(ValueError, match="key_cache has batch size 4"):
        flash_attn.flash_attn_with_kvcache(*tensors, **{**good, "cache_batch_idx": None})
    for before, after in ((cache.k, k_cache), (cache.v, v_cache)):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


FULL = torch.zeros(2, 3, 2, 16)
REFUSED = {
    "qv": FULL,
    "q_descale": FULL,
    "k_descale": FULL,
    "v_descale": FULL,
    "cu_seqlens_k_new": FULL,
    "max_seqlen_q": 3,
    "scheduler_metadata": FULL,
    "attention_chunk": 4,
}


@pytest.mark.parametrize("argument", REFUSED)
def test_flash_attn_3_refuses_by_name(argument: str) -> None:
    with pytest.raises(NotImplementedError, match=argument):
        flash_attn_3.flash_attn_with_kvcache(FULL, FULL, FULL, **{argument: REFUSED[argument]})
