"""mfa.flash_attn: the conventions of flash-attn 2.8, against float64 and flash-attn's own documentation."""

import math
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from torch import Tensor

import mfa
from mfa import flash_attn

SLOPES = torch.tensor([[0.5, 0.25, 0.1, 0.02], [0.3, 0.0, 0.7, 0.2]])
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # Lq, Lk, arguments, the oracle's terms
    "open": (9, 13, {}, {}),
    "causal, more keys": (9, 13, {"causal": True}, {"window": (None, 0)}),
    "causal, more queries": (13, 9, {"causal": True}, {"window": (None, 0)}),
    "window": (9, 13, {"window_size": (3, 1)}, {"window": (3, 1)}),
    "windows of 0": (9, 13, {"window_size": (0, 0)}, {"window": (0, 0)}),
    "half-open windows": (9, 13, {"window_size": (-1, 1)}, {"window": (None, 1)}),
    "causal closes the right": (9, 13, {"causal": True, "window_size": (4, 2)}, {"window": (4, 0)}),
    "alibi": (9, 13, {"alibi_slopes": SLOPES[0], "causal": True}, {"alibi_slopes": SLOPES[0], "window": (None, 0)}),
    "alibi by batch": (13, 9, {"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    "softcap and scale": (9, 13, {"softcap": 3.0, "softmax_scale": 0.9}, {"softcap": 3.0, "scale": 0.9}),
}


def inputs(length_q: int, length_k: int, heads: int = 4, key_heads: int = 2, dim: int = 16) -> list[Tensor]:
    """Q [2,Lq,H,D], k and v [2,Lk,Hkv,D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length_q, heads, dim), (2, length_k, key_heads, dim), (2, length_k, key_heads, dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, device: Device) -> None:
    length_q, length_k, arguments, terms = CASES[case]
    tensors = [tensor.to(device.type).requires_grad_() for tensor in inputs(length_q, length_k)]
    grad = torch.randn(2, length_q, 4, 16, generator=torch.Generator().manual_seed(1))
    arguments = {name: a.to(device.type) if isinstance(a, Tensor) else a for name, a in arguments.items()}
    with device.active():
        out, lse, probabilities = flash_attn.flash_attn_func(*tensors, **arguments, return_attn_probs=True)
        gradients = torch.autograd.grad(out, tensors, grad.to(device.type))
    assert out.is_contiguous()
    assert probabilities.numel() == 0

    wanted = []
    for attend, dtype in ((oracle.attention, torch.float64), (oracle.composition, torch.float32)):
        heads_first = [tensor.detach().cpu().transpose(1, 2).to(dtype).requires_grad_() for tensor in tensors]
        theirs, their_lse = attend(*heads_first, **terms)
        their_grads = torch.autograd.grad(theirs, heads_first, grad.transpose(1, 2).to(theirs.dtype))
        wanted.append([*(tensor.transpose(1, 2) for tensor in (theirs, *their_grads)), their_lse])
    for i, (actual, expected, plain) in enumerate(zip((out, *gradients, lse), *wanted, strict=True)):
        allowed = oracle.tolerance(plain, expected, gradient=0 < i < 4)
        assert oracle.largest_error(actual.cpu(), expected) <= allowed


@pytest.mark.parametrize(("length_q", "length_k", "picture"), [(2, 5, "11110 11111"), (5, 2, "00 00 00 10 11")])
def test_causal_pictures_of_the_documentation(length_q: int, length_k: int, picture: str, device: Device) -> None:
    queries, keys = torch.zeros(1, length_q, 1, 8), torch.zeros(1, length_k, 1, 8)
    values = torch.eye(length_k, 8)[None, :, None]
    with torch.no_grad(), device.active():
        out = flash_attn.flash_attn_func(*(t.to(device.type) for t in (queries, keys, values)), causal=True)
    seen = torch.tensor([[float(digit) for digit in row] for row in picture.split()])
    expected = seen / seen.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[0, :, 0, :length_k].cpu(), expected)


def test_dropout() -> None:
    q, k, v = inputs(9, 13)
    starts = [torch.tensor([0, length], dtype=torch.int32) for length in (9, 13)]
    torch.manual_seed(0)
    expected = mfa.attention(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.5, enable_gqa=True).transpose(1, 2)
    torch.manual_seed(0)
    torch.testing.assert_close(flash_attn.flash_attn_func(q, k, v, 0.5), expected)
    torch.manual_seed(0)
    packed = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *starts, 9, 13, 0.5)
    torch.testing.assert_close(packed, expected[0])


def test_packed_is_the_same() -> None:
    qkv = torch.randn(2, 7, 3, 4, 16, requires_grad=True)
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv.unbind(2))
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    also = flash_attn.flash_attn_kvpacked_func(q.detach(), torch.stack((k, v), 2).detach(), causal=True)
    for actual in (out, also):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(gradient, torch.stack(gradients, 2), rtol=0, atol=0)


def test_varlen_is_each_sequence(device: Device) -> None:
    lengths_q, lengths_k = [5, 0, 9], [8, 3, 2]
    starts_q, starts_k = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (lengths_q, lengths_k)
    )
    q, kv = torch.randn(14, 4, 16), torch.randn(13, 2, 2, 16)
    terms: dict[str, Any] = {"causal": True, "window_size": (4, -1), "softcap": 2.0, "alibi_slopes": SLOPES[0]}
    moved = [tensor.to(device.type) for tensor in (q, kv, starts_q, starts_k)]
    there = {**terms, "alibi_slopes": SLOPES[0].to(device.type)}
    with device.active():
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            *(moved[0], *moved[1].unbind(1), *moved[2:], 9, 8), **there, deterministic=True, return_attn_probs=True
        )
        packed = flash_attn.flash_attn_varlen_kvpacked_func(*moved, 9, 8, **there)
    torch.testing.assert_close(packed, out, rtol=0, atol=0)
    sequences = zip(q.split(lengths_q), *(part.split(lengths_k) for part in kv.unbind(1)), strict=True)
    for n, (query, key, value) in enumerate(sequences):
        rows = slice(int(starts_q[n]), int(starts_q[n + 1]))
        alone, alone_lse, _ = flash_attn.flash_attn_func(
            query[None], key[None], value[None], **terms, return_attn_probs=True
        )
        torch.testing.assert_close(out[rows].cpu(), alone[0])
        torch.testing.assert_close(lse[:, rows].cpu(), alone_lse[0])


def test_varlen_qkvpacked() -> None:
    qkv, starts = torch.randn(11, 3, 2, 16), torch.tensor([0, 4, 11], dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts, 7, causal=True)
    for rows in (slice(0, 4), slice(4, 11)):
        alone = flash_attn.flash_attn_qkvpacked_func(qkv[None, rows], causal=True)
        torch.testing.assert_close(out[None, rows], alone)


@pytest.mark.parametrize("form", ["dense", "int lengths", "batch index", "paged"])
def test_kvcache(form: str, device: Device) -> None:
    """New tokens land in the caches that were given, and the result is that of the live tokens; others are NaN."""
    lengths, capacity, new = (5, 5) if form == "int lengths" else (5, 3), 16, 2
    q, k, v = inputs(3, new)
    entries = [3, 1] if form == "batch index" else [0, 1]
    k_cache, v_cache = (torch.full((4, capacity, 2, 16), math.nan) for _ in range(2))
    live = [torch.randn(2, length, 2, 16) for length in lengths]  # [k or v,...]
    for entry, tokens in zip(entries, live, strict=True):
        k_cache[entry, : tokens.shape[1]], v_cache[entry, : tokens.shape[1]] = tokens
    arguments: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, dtype=torch.int32)}
    caches = (k_cache[:2], v_cache[:2])
    if form == "int lengths":
        arguments = {"cache_seqlens": lengths[0]}
    elif form == "batch index":
        arguments["cache_batch_idx"] = torch.tensor(entries, dtype=torch.int32)
        caches = (k_cache, v_cache)
    elif form == "paged":  # the pages of entry 1 in the other order
        caches = tuple(cache.view(-1, 8, 2, 16)[[0, 1, 3, 2]] for cache in caches)
        arguments["block_table"] = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    copies = [cache.clone() for cache in caches]
    terms: dict[str, Any] = {"causal": True, "window_size": (4, -1), "return_softmax_lse": True}
    there = {name: x.to(device.type) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    changed_caches = [cache.to(device.type) for cache in caches]
    with device.active():
        results = flash_attn.flash_attn_with_kvcache(
            *(q.to(device.type), *changed_caches, k.to(device.type), v.to(device.type)), **there, **terms
        )
    out, lse = (result.cpu() for result in results)
    caches = tuple(cache.cpu() for cache in changed_caches)
    for n, tokens in enumerate(live):
        keys, values = torch.cat((tokens, torch.stack((k[n], v[n]))), 1)
        expected, expected_lse, _ = flash_attn.flash_attn_func(
            *(q[n : n + 1], keys[None], values[None]), causal=True, window_size=(4, -1), return_attn_probs=True
        )
        torch.testing.assert_close(out[n : n + 1], expected)
        torch.testing.assert_close(lse[n : n + 1], expected_lse)
    for cache, copy in zip(caches, copies, strict=True):
        changed = (cache == cache) & ~(copy == copy)  # no longer NaN
        assert changed.sum() == 2 * new * 2 * 16


def test_kvcache_without_lengths_is_full() -> None:
    q, k, v = inputs(1, 8)
    out = flash_attn.flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, k, v))


CACHE = torch.zeros(2, 12, 2, 16)
NEW = torch.zeros(2, 1, 2, 16)
STARTS = torch.tensor([0, 2], dtype=torch.int32)
REFUSED = {
    "return_attn_probs": lambda: flash_attn.flash_attn_func(NEW, NEW, NEW, 0.5, return_attn_probs=True),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_refuses_by_name(argument: str) -> None:
    with pytest.raises(NotImplementedError, match=argument):
        REFUSED[argument]()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="k has 3 dimensions"):
        flash_attn.flash_attn_func(NEW, NEW[0], NEW)
    with pytest.raises(ValueError, match=r"qkv has shape .*\[B,L,3,H,D\]"):
        flash_attn.flash_attn_qkvpacked_func(NEW)
    with pytest.raises(TypeError, match="window_size"):
        flash_attn.flash_attn_func(NEW, NEW, NEW, window_size=(None, None))
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn.flash_attn_with_kvcache(NEW, CACHE, CACHE, NEW, NEW)


def test_compiles() -> None:
    compiled = torch.compile(flash_attn.flash_attn_func, backend="aot_eager", fullgraph=True)
    tensors = inputs(9, 13)
    expected = flash_attn.flash_attn_func(*tensors, causal=True, window_size=(4, -1))
    torch.testing.assert_close(compiled(*tensors, causal=True, window_size=(4, -1)), expected)
