"""Attention over a cache with what mfa.attention_with_kv_cache hasn't got: rotary embeddings, leftpad, batch index."""

from typing import Any

import torch
from torch import Tensor

from .._arguments import Decode
from .._checks.cache import PAGE_MULTIPLE, check_lengths
from .._checks.indices import check_index_tensor, host_values
from .._log import once
from ..kv_cache import attention_with_kv_cache
from ._conventions import Window, bounds, heads_first
from .rotary import apply_rotary


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    *,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    rotary_seqlens: Tensor | None = None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_with_kvcache`, whose arguments these are: out [B,Lq,Hq,D] and lse [B,Hq,Lq].

    rotary_seqlens: int32 [B], the positions of the first new tokens, where they aren't cache_seqlens.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if tensor is not None:
            heads_first(name, tensor)  # which checks it
    if block_table is not None:
        for name, given in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if given is not None:
                raise ValueError(f"{name} is given, and block_table too; it must be None for a paged cache")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens is None; it must be given when k is")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    window = bounds(window_size, causal)
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            missing = "rotary_cos" if rotary_cos is None else "rotary_sin" if rotary_sin is None else "k"
            raise ValueError(f"{missing} is None; rotary_cos, rotary_sin, k and v must be given together")
        offsets = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        q = _rotated_queries(q, rotary_cos, rotary_sin, offsets, rotary_interleaved, at_once=window == (None, None))
        k = apply_rotary(k, rotary_cos, rotary_sin, offsets, interleaved=rotary_interleaved)

    query, keys, values = q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    key, value = (None if tensor is None else tensor.transpose(1, 2) for tensor in (k, v))
    copied = cache_leftpad is not None or (cache_batch_idx is not None and k_cache.shape[1] % PAGE_MULTIPLE != 0)
    lengths = cache_seqlens
    if copied:
        keys, values, lengths = _copies(query, keys, values, k, cache_seqlens, cache_batch_idx, cache_leftpad)
    elif cache_batch_idx is not None:
        block_table = cache_batch_idx[:, None]  # an entry is a page of its own
    out, lse = attention_with_kv_cache(
        *(query, keys, values),
        key=key,
        value=value,
        cache_seqlens=lengths,
        block_table=block_table,
        is_causal=False,
        scale=softmax_scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=True,
    )
    if copied and k is not None and v is not None:
        entries = _entries(q, cache_batch_idx)
        tokens = torch.arange(k.shape[1], device=q.device)
        slots = _column(cache_seqlens) + tokens
        for cache, rows in ((k_cache, k), (v_cache, v)):
            cache[entries, slots.clamp(0, cache.shape[1] - 1)] = rows.to(cache.dtype)
    return out.transpose(1, 2), lse


def _rotated_queries(
    q: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, interleaved: bool, *, at_once: bool
) -> Tensor:
    """At the positions of the new keys; where every query sees every key, all of them at that of the first."""
    if not at_once:
        return apply_rotary(q, cos, sin, offsets, interleaved=interleaved)
    batch, length, heads, dim = q.shape
    as_heads = apply_rotary(q.reshape(batch, 1, length * heads, dim), cos, sin, offsets, interleaved=interleaved)
    return as_heads.view(q.shape)


def _copies(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: Tensor | None,
    cache_seqlens: int | Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
) -> tuple[Tensor, Tensor, int | Tensor]:
    """The cache's entries [B,Hkv,Lmax,D], each from its leftpad on, and their lengths; everything is checked before."""
    batch, slots = query.shape[0], keys.shape[2]
    count = 0 if new is None else new.shape[1]
    as_pages = None
    if cache_batch_idx is not None:
        check_index_tensor("cache_batch_idx", cache_batch_idx, query, "[B]", (batch,))
        as_pages = cache_batch_idx[:, None]
    elif keys.shape[0] != batch:
        raise ValueError(f"k_cache has batch size {keys.shape[0]}; it must be that of q, {batch}")
    ends: Any = cache_seqlens  # which may be a number
    arguments = Decode(query, keys, values, ends, as_pages, None, None, None, None, 1.0, None, None, 0.0, 0)
    check_lengths("cache_seqlens", cache_seqlens, count, arguments)
    rows = torch.arange(slots, device=query.device)
    lengths = cache_seqlens
    if cache_leftpad is not None:
        check_index_tensor("cache_leftpad", cache_leftpad, query, "[B]", (batch,))
        _check_leftpad(cache_leftpad, cache_seqlens)
        rows = (rows + _column(cache_leftpad)).clamp(0, slots - 1)
        lengths = cache_seqlens - cache_leftpad
    why = "cache_batch_idx" if cache_leftpad is None else "cache_leftpad"
    once(f"{why}: mfa.flash_attn copies the cache for the call")
    entries = _entries(query, cache_batch_idx).clamp(0, max(keys.shape[0] - 1, 0))
    copies = [cache.transpose(1, 2)[entries, rows].transpose(1, 2) for cache in (keys, values)]
    return copies[0], copies[1], lengths


def _check_leftpad(leftpad: Tensor, cache_seqlens: int | Tensor) -> None:
    pads = host_values(leftpad)
    ends = host_values(cache_seqlens) if isinstance(cache_seqlens, Tensor) else [cache_seqlens] * leftpad.shape[0]
    for entry, (pad, end) in enumerate(zip(pads or (), ends or (), strict=False)):
        if not 0 <= pad <= end:
            raise ValueError(f"cache_leftpad is {pad} at {entry}; it must be within 0 ... {end}, cache_seqlens")


def _entries(like: Tensor, cache_batch_idx: Tensor | None) -> Tensor:
    """int64 [B,1]."""
    if cache_batch_idx is not None:
        return cache_batch_idx.long()[:, None]
    return torch.arange(like.shape[0], device=like.device)[:, None]


def _column(counts: int | Tensor) -> int | Tensor:
    return counts.long()[:, None] if isinstance(counts, Tensor) else counts
