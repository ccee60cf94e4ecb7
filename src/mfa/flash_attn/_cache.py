"""Attention over a cache with what mfa.attention_with_kv_cache hasn't got: rotary embeddings."""

from torch import Tensor

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
    out, lse = attention_with_kv_cache(
        *(query, keys, values),
        key=key,
        value=value,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        is_causal=False,
        scale=softmax_scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        return_lse=True,
    )
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
