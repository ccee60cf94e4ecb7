"""flash-attn's functions. Each hands its arguments, in flash-attn's conventions, to mfa's."""

from typing import Any

from torch import Tensor

from ..attention import attention
from ..varlen import attention_varlen
from . import _cache, _packed
from ._conventions import Window, bounds, check_probs, heads_first, unpacked
from ._low_level import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)

__version__ = "2.8.3+mfa"  # whose interface this is

__all__ = [
    "__version__",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """softmax(scale * Q K' + mask) V, in the layout of flash-attn.

    Args:
        q: [B,Lq,Hq,D]; k: [B,Lk,Hkv,D]; v: [B,Lk,Hkv,Dv]. Hq is a multiple of Hkv.
        dropout_p: within [0, 1).
        softmax_scale: of the scores; None is 1/sqrt(D).
        causal: query i sees key j iff j <= i+Lk-Lq.
        window_size: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right; a negative bound is open.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap).
        alibi_slopes: float32 [Hq] or [B,Hq]: adds -slope*|i+Lk-Lq-j|.
        deterministic: changes nothing: results always are.
        return_attn_probs: also return the lse, and an empty tensor where flash-attn has its dropout pattern.

    Returns:
        out [B,Lq,Hq,Dv]; with return_attn_probs (out, lse float32 [B,Hq,Lq], empty).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention`, which calls q, k, v query, key, value;
        NotImplementedError: return_attn_probs together with dropout_p.
    """
    check_probs("return_attn_probs", return_attn_probs, dropout_p)
    out, lse = attention(
        heads_first("q", q),
        heads_first("k", k),
        heads_first("v", v),
        dropout_p=dropout_p,
        scale=softmax_scale,
        enable_gqa=True,
        window=bounds(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of one tensor qkv [B,L,3,H,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = unpacked("qkv", qkv, 3, "[B,L,3,H,D]")
    return flash_attn_func(q, k, v, *tail)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of q [B,Lq,Hq,D] and kv [B,Lk,2,Hkv,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = unpacked("kv", kv, 2, "[B,Lk,2,Hkv,D]")
    return flash_attn_func(q, k, v, *tail)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> _Result:
    """`flash_attn_func` of N sequences, packed: q [Tq,Hq,D], k [Tk,Hkv,D], v [Tk,Hkv,Dv], cu_seqlens int32 [N+1].

    The other arguments are those of `flash_attn_func`, for each sequence; alibi_slopes may be [N,Hq]. With block_table
    int32 [N,pages per sequence], k and v are pages [pages,page,Hkv,D], page a multiple of 8, of which sequence n has
    cu_seqlens_k[n+1]-cu_seqlens_k[n] tokens; without dropout and gradients.

    Returns:
        out [Tq,Hq,Dv]; with return_attn_probs (out, lse float32 [Hq,Tq], empty).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention_varlen`, which calls q, k, v query, key, value;
        NotImplementedError: return_attn_probs together with dropout_p.
    """
    check_probs("return_attn_probs", return_attn_probs, dropout_p)
    terms: dict[str, Any] = {
        "scale": softmax_scale,
        "window": bounds(window_size, causal),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }
    if block_table is not None:
        lengths = _packed.lengths_of(q, cu_seqlens_k, None)
        layout = (cu_seqlens_q, lengths, max_seqlen_q, max_seqlen_k)
        out, lse = _packed.over_pages(q, k, v, *layout, block_table=block_table, **terms)
    else:
        layout = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = attention_varlen(q, k, v, *layout, **terms, return_lse=True)
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` of one tensor qkv [T,3,H,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = unpacked("qkv", qkv, 3, "[T,3,H,D]")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *tail)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` of q [Tq,Hq,D] and kv [Tk,2,Hkv,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = unpacked("kv", kv, 2, "[Tk,2,Hkv,D]")
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *tail)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the caches, in place, and attends over their live part.

    Args:
        q: [B,Lq,Hq,D].
        k_cache, v_cache: dense [Bcache,Lmax,Hkv,D], or with block_table [pages,page,Hkv,D]. Modified if k is given.
        k, v: [B,Lnew,Hkv,D], appended at cache_seqlens; both or none.
        rotary_cos, rotary_sin: [positions,R/2], R <= D: k is rotated at positions cache_seqlens, cache_seqlens+1, ...
            before it is appended. So are queries that are causal or have a window; others are all at cache_seqlens.
        cache_seqlens: int32 [B] or one integer: tokens in the cache before the call, those before cache_leftpad
            included. None, without k: it is full.
        cache_batch_idx: int32 [B]: which entry of a dense cache each batch entry has; None is 0 ... B-1. Unless Lmax is
            a multiple of 8, the cache is copied for the call.
        cache_leftpad: int32 [B]: where tokens start in a dense cache, which is copied for the call.
        block_table: int32 [B,pages per sequence].
        rotary_interleaved: pairs are dimensions 2i and 2i+1; else i and i+R/2.
        num_splits: into how many parts the kernels cut the keys; 0 lets them choose.
        The others: as in `flash_attn_func`; causal and windows are aligned to the lower right of the live part.

    Returns:
        out [B,Lq,Hq,D]; with return_softmax_lse (out, lse float32 [B,Hq,Lq]).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention_with_kv_cache`, which calls q, k, v query, key,
        value; ValueError: rotary_cos without rotary_sin or k, block_table with cache_batch_idx or cache_leftpad.
    """
    out, lse = _cache.attend(
        *(q, k_cache, v_cache, k, v),
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
    )
    return (out, lse) if return_softmax_lse else out
