"""Attention over a cache: flash-attn's arguments as mfa.attention_with_kv_cache takes them."""

from torch import Tensor

from ..kv_cache import attention_with_kv_cache
from ._conventions import Window, bounds, heads_first


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
    if k is None and not (rotary_cos is None and rotary_sin is None):
        raise ValueError("k is None; rotary_cos, rotary_sin, k and v must be given together")

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
        window=bounds(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        rotary_seqlens=rotary_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        return_lse=True,
    )
    return out.transpose(1, 2), lse
