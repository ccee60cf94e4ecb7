"""Head dimensions of 257 ... 512, and MLA's 576 with values of 512: kernels of teams of SIMD-groups."""

from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from serving import FORMATS, Cached
from test_kv_cache import check
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mfa
from mfa import sdpa

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = st.tuples(st.integers(257, 512), st.integers(1, 512)) | st.sampled_from(
    ((320, 320), (384, 384), (512, 512), (576, 512), (100, 500), (260, 64))
)
BOUNDS = st.none() | st.integers(-5, 40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and value, and terms as the oracle's."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, key_heads, group = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (1, 2, 3))))
    lengths = draw(st.sampled_from((1, 7, 8, 17, 40))), draw(st.sampled_from((1, 8, 15, 33, 65)))
    dim, value_dim = draw(DIMS)

    def rows(heads: int, length: int, width: int) -> Tensor:
        heads_last = torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
        return heads_last if draw(st.booleans()) else heads_last.contiguous()

    heads = key_heads * group
    tensors = [rows(heads, lengths[0], dim), rows(key_heads, lengths[1], dim), rows(key_heads, lengths[1], value_dim)]
    bias = {
        "none": None,
        "mask": torch.rand(batch, 1, *lengths, generator=generator) < 0.7,
        "float": torch.randn(1, heads, *lengths, generator=generator),
    }[draw(st.sampled_from(("none", "none", "mask", "float")))]
    terms = {"bias": bias, "window": draw(st.just((None, None)) | st.tuples(BOUNDS, BOUNDS))}
    terms["softcap"] = draw(st.sampled_from((0.0, 0.0, 5.0)))
    if draw(st.booleans()):
        terms["sinks"] = torch.randn(heads, generator=generator)
    if draw(st.booleans()):
        terms["alibi_slopes"] = torch.rand(heads, generator=generator)
    return tensors, terms


@pytest.mark.parametrize("shard", range(4))
def test_random_problems(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=25)
    @given(problems())
    def holds(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
        tensors, terms = problem
        own = {name: x.to(device.type) if isinstance(x, Tensor) else x for name, x in terms.items()}
        mask = own.pop("bias")
        results = []
        for order in (0, 1) if device.name == "simulator" else (0,):
            with device.active(seed=order):
                inputs = (x.to(device.type) for x in tensors)
                grouped = tensors[0].shape[1] != tensors[1].shape[1]
                results.append(
                    [x.cpu() for x in mfa.attention(*inputs, mask, enable_gqa=grouped, return_lse=True, **own)]
                )
        expected, plain = oracle.attention(*tensors, **terms), oracle.composition(*tensors, **terms)
        for actual, reference, composed in zip(results[0], expected, plain, strict=True):
            assert oracle.largest_error(actual, reference) <= oracle.tolerance(composed, reference)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)

    holds()


def test_packed_sequences(device: Device) -> None:
    lengths = [5, 0, 19, 8]
    starts = torch.tensor([0, 5, 5, 24, 32], dtype=torch.int32, device=device.type)
    query, key, value = (torch.randn(32, 2, 320) for _ in range(3))
    with device.active():
        inputs = (x.to(device.type) for x in (query, key, value))
        out = mfa.attention_varlen(*inputs, starts, starts, 19, 19, is_causal=True).cpu()
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        one = [x[rows].transpose(0, 1)[None] for x in (query, key, value)]
        expected, plain = (f(*one, is_causal=True)[0] for f in (oracle.attention, oracle.composition))
        if length:
            actual = out[rows].transpose(0, 1)[None]
            assert oracle.largest_error(actual, expected) <= oracle.tolerance(plain, expected)
        first += length


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("dim", "value_dim", "bucket"), [(512, 512, 1024), (384, 384, 768), (300, 290, 640), (576, 512, 1088)]
)
def test_products_are_those_of_the_bucket(dim: int, value_dim: int, bucket: int) -> None:
    query, key, value = (torch.randn(1, 2, 64, width, dtype=torch.float16) for width in (dim, dim, value_dim))
    with mfa.simulate() as sim:
        mfa.attention(query, key, value)
    assert sim.counters.mma == 2 * 8 * 8 * bucket // 8
    assert "_team_" in sim.launches[-1].kernel


@pytest.mark.simulator
def test_a_vaes_attention_is_routed_and_makes_no_matrix() -> None:
    """One head of 512 over the pixels of a latent."""
    query, key, value = (torch.randn(1, 1, 144, 512, dtype=torch.float16) for _ in range(3))
    expected = oracle.attention(query, key, value)[0]
    with sdpa.enabled(), mfa.simulate() as sim:
        out = scaled_dot_product_attention(query, key, value)
    assert oracle.largest_error(out, expected) <= oracle.tolerance(oracle.composition(query, key, value)[0], expected)
    assert [launch.kernel.split("_")[0] for launch in sim.launches] == ["forward"]


def test_kernels_have_no_backward_pass_yet_and_say_so(device: Device) -> None:
    query, key, value = (torch.randn(1, 1, 5, 264, device=device.type) for _ in range(3))
    query.requires_grad_()
    with device.active():
        if not device.has_kernels:
            mfa.attention(query, key, value).sum().backward()
            return
        with pytest.raises(NotImplementedError, match="query has head dimension 264, and the call requires grad"):
            mfa.attention(query, key, value)
        with torch.no_grad():
            mfa.attention(query, key, value)


# -- caches ---------------------------------------------------------------------------------------------------------


@st.composite
def cached(draw: st.DrawFn) -> Cached:
    lengths = draw(st.lists(st.sampled_from((0, 1, 7, 9, 17, 33, 65)), min_size=1, max_size=2))
    page = draw(st.sampled_from((None, 8, 16)))
    return Cached(
        dtype=draw(st.sampled_from(DTYPES)),
        formats=draw(st.just((None, None)) | st.tuples(*[st.sampled_from(FORMATS)] * 2)),
        key_heads=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 3, 16))),
        lengths=tuple(lengths),
        query_length=draw(st.sampled_from((1, 2, 5))),
        new=draw(st.sampled_from((None, 1, 2))),
        page=page,
        dims=draw(DIMS),
        window=draw(st.just((None, None)) | st.tuples(BOUNDS, BOUNDS)),
        softcap=draw(st.sampled_from((0.0, 5.0))),
        has_sinks=draw(st.booleans()),
        num_splits=draw(st.sampled_from((0, 1, 3))),
        leftpad=None if page else draw(st.none() | st.tuples(*[st.integers(0, length) for length in lengths])),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("shard", range(3))
def test_random_caches(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=20)
    @given(cached())
    def holds(problem: Cached) -> None:
        check(problem, device)

    holds()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_latents_of_mla(device: Device, dtype: torch.dtype, kept: torch.dtype | None) -> None:
    """The value is the key's first 512 columns."""
    generator = torch.Generator().manual_seed(0)
    query, latents = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 16, 1, 576), (2, 1, 700, 576))
    )
    scales: dict[str, Any] = {}
    wide = latents
    if kept is not None:
        latents, scale = mfa.quantize_kv(latents, kept)
        wide = latents.double() * scale.double()[..., None]
        scales = {"key_scale": scale.to(device.type), "value_scale": scale.to(device.type)}
    lengths = torch.tensor([700, 600], dtype=torch.int32)
    there = latents.to(device.type)
    with device.active():
        out = mfa.attention_with_kv_cache(
            query.to(device.type), there, there[..., :512], cache_seqlens=lengths.to(device.type), **scales
        ).cpu()
    for entry, length in enumerate(lengths.tolist()):
        live = wide[entry, None, :, :length]
        expected = oracle.attention(query[entry, None], live, live[..., :512])[0]
        plain = oracle.composition(query[entry, None], live.to(dtype), live[..., :512].to(dtype))[0]
        assert oracle.largest_error(out[entry, None], expected) <= oracle.tolerance(plain, expected)


@pytest.mark.simulator
@pytest.mark.parametrize("kept", [None, torch.int8])
def test_each_latent_is_read_once(kept: torch.dtype | None) -> None:
    query, latents = (torch.randn(*shape, dtype=torch.float16) for shape in ((1, 16, 1, 576), (1, 1, 2048, 576)))
    scales: dict[str, Any] = {}
    if kept is not None:
        latents, scale = mfa.quantize_kv(latents, kept)
        scales = {"key_scale": scale, "value_scale": scale}
    with mfa.simulate() as sim:
        mfa.attention_with_kv_cache(query, latents, latents[..., :512], cache_seqlens=2048, num_splits=1, **scales)
    (launch,) = sim.launches
    assert launch.constants["value_is_key"]
    assert launch.counters.device_read_bytes <= 1.1 * latents.numel() * latents.element_size()


@pytest.mark.simulator
def test_prefill_of_latents_reads_them_once_per_tile() -> None:
    query, latents = (torch.randn(*shape, dtype=torch.float16) for shape in ((1, 4, 64, 576), (1, 1, 256, 576)))
    value = latents[..., :512]
    with mfa.simulate() as sim:
        out = mfa.attention(query, latents, value, enable_gqa=True)
    expected, plain = (f(query, latents, value)[0] for f in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)
    tiles = 4 * 64 // 16
    assert sim.counters.device_read_bytes <= 1.05 * (tiles * latents.numel() + query.numel()) * 2
