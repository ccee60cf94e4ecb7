"""flash-attn's functions. Each hands its arguments, in flash-attn's conventions, to mfa's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import attention
from ..kv_cache import attention_with_kv_cache
from ..varlen import attention_varlen

__version__ = "2.8.3+mfa"  # whose interface this is

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_Window = tuple[int, int]
_Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
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
    _check_probs(return_attn_probs, dropout_p)
    out, lse = attention(
        _heads_first("q", q),
        _heads_first("k", k),
        _heads_first("v", v),
        dropout_p=dropout_p,
        scale=softmax_scale,
        enable_gqa=True,
        window=_window(window_size, causal),
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
    window_size: _Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of one tensor qkv [B,L,3,H,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpacked("qkv", qkv, 3, "[B,L,3,H,D]")
    return flash_attn_func(q, k, v, *tail)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of q [B,Lq,Hq,D] and kv [B,Lk,2,Hkv,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpacked("kv", kv, 2, "[B,Lk,2,Hkv,D]")
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
    window_size: _Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> _Result:
    """`flash_attn_func` of N sequences, packed: q [Tq,Hq,D], k [Tk,Hkv,D], v [Tk,Hkv,Dv], cu_seqlens int32 [N+1].

    The other arguments are those of `flash_attn_func`, for each sequence; alibi_slopes may be [N,Hq].

    Returns:
        out [Tq,Hq,Dv]; with return_attn_probs (out, lse float32 [Hq,Tq], empty).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention_varlen`, which calls q, k, v query, key, value;
        NotImplementedError: return_attn_probs together with dropout_p; block_table.
    """
    _check_probs(return_attn_probs, dropout_p)
    _refuse("block_table", block_table, "use flash_attn_with_kvcache")
    out, lse = attention_varlen(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        scale=softmax_scale,
        window=_window(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=True,
    )
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` of one tensor qkv [T,3,H,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    q, k, v = _unpacked("qkv", qkv, 3, "[T,3,H,D]")
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
    window_size: _Window = (-1, -1),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_varlen_func` of q [Tq,Hq,D] and kv [Tk,2,Hkv,D]; its parts are read in place."""
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    k, v = _unpacked("kv", kv, 2, "[Tk,2,Hkv,D]")
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
    window_size: _Window = (-1, -1),
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
        cache_seqlens: int32 [B] or one integer: tokens in the cache before the call. None, without k: it is full.
        cache_batch_idx: int32 [B]: which entry of a dense cache each batch entry has; None is 0 ... B-1. Lmax must be a
            multiple of 8 then.
        block_table: int32 [B,pages per sequence].
        num_splits: into how many parts the kernels cut the keys; 0 lets them choose.
        rotary_interleaved: changes nothing without rotary_cos, which isn't supported.
        The others: as in `flash_attn_func`; causal and windows are aligned to the lower right of the live part.

    Returns:
        out [B,Lq,Hq,D]; with return_softmax_lse (out, lse float32 [B,Hq,Lq]).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention_with_kv_cache`, which calls q, k, v query, key,
        value; NotImplementedError: rotary_cos, rotary_sin, cache_leftpad; cache_batch_idx with another Lmax.
    """
    for name, rotary in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        _refuse(name, rotary, "rotate q and k before the call")
    _refuse("cache_leftpad", cache_leftpad, "let each sequence start at slot 0")
    keys, values = _heads_first("k_cache", k_cache), _heads_first("v_cache", v_cache)
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx is given, and block_table too; it must be None for a paged cache")
        if k_cache.shape[1] % 8:
            raise NotImplementedError(
                f"cache_batch_idx is not supported for a k_cache of {k_cache.shape[1]} tokens; only for a multiple of 8"
            )
        block_table = cache_batch_idx[:, None]  # an entry is a page of its own
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens is None; it must be given when k is")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    out, lse = attention_with_kv_cache(
        *(_heads_first("q", q), keys, values),
        *(new if new is None else _heads_first(name, new) for name, new in (("k", k), ("v", v))),
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        is_causal=False,
        scale=softmax_scale,
        window=_window(window_size, causal),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _heads_first(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4")
    return tensor.transpose(1, 2)


def _unpacked(name: str, tensor: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    if tensor.dim() != layout.count(",") + 1 or tensor.shape[-3] != parts:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have shape {layout}")
    return tensor.unbind(-3)


def _window(window_size: _Window, causal: bool) -> tuple[int | None, int | None]:
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise TypeError(f"window_size is {window_size!r}; it must be a pair (left, right)")
    if not all(isinstance(bound, (int, torch.SymInt)) for bound in window_size):
        raise TypeError(f"window_size is {tuple(window_size)!r}; its entries must be integers, -1 for open")
    left, right = (None if bound < 0 else bound for bound in window_size)
    return left, 0 if causal else right


def _check_probs(return_attn_probs: bool, dropout_p: float) -> None:
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            "return_attn_probs is not supported with dropout_p; without it, it returns the lse and an empty tensor"
        )


def _refuse(name: str, value: object, instead: str) -> None:
    if value is not None:
        raise NotImplementedError(f"{name} is not supported; it must be None: {instead}")
