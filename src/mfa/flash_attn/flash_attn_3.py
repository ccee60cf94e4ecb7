"""FlashAttention-3's module flash_attn_interface, as far as mfa's kernels go.

Its functions have no dropout and no ALiBi. What changes a result and isn't supported is refused by name: qv, descaling
of 8-bit inputs.
"""

from functools import reduce

import torch
from torch import Tensor

from ..attention import attention
from ..merge import merge_attention
from . import _cache, _packed
from ._conventions import Bounds, Window, bounds, heads_first, refuse, unpacked

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_Result = Tensor | tuple[Tensor, Tensor]
_QV = "concatenate q and qv, k and v along D"
_DESCALE = "scale q, k and v in a dtype of at least 16 bits"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> _Result:
    """softmax(scale * Q K' + mask) V, in the layout of flash-attn.

    Args:
        q, k, v, softmax_scale, causal, window_size, softcap: as in `mfa.flash_attn.flash_attn_func`.
        qv, q_descale, k_descale, v_descale: must be None.
        attention_chunk: > 0: query i sees keys of the same chunk of that many positions as its own, i+Lk-Lq.
        num_splits, pack_gqa, deterministic, sm_margin: change nothing: the kernels choose, and results are always
            deterministic.
        return_attn_probs: also return the lse.

    Returns:
        out [B,Lq,Hq,Dv]; with return_attn_probs (out, lse float32 [B,Hq,Lq]).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention`, which calls q, k, v query, key, value;
        NotImplementedError: an argument that must be None.
    """
    refuse(_QV, qv=qv)
    refuse(_DESCALE, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    window = bounds(window_size, causal)
    queries, keys, values = heads_first("q", q), heads_first("k", k), heads_first("v", v)
    if attention_chunk != 0:
        out, lse = _chunked(q, k, v, attention_chunk, softmax_scale, window, softcap)
    else:
        out, lse = attention(
            *(queries, keys, values),
            scale=softmax_scale,
            enable_gqa=True,
            window=window,
            softcap=softcap,
            return_lse=True,
        )
        out = out.transpose(1, 2)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of one tensor qkv [B,L,3,H,D], or with num_heads_q [B,L,Hq+2*Hkv,D], read in place."""
    if qkv.dim() == 4 and num_heads_q is not None:
        heads, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if heads <= 0 or odd:
            raise ValueError(f"qkv has {qkv.shape[2]} heads, num_heads_q is {num_heads_q}; it must have Hq+2*Hkv")
        q, k, v = qkv.split([num_heads_q, heads, heads], 2)
    else:
        q, k, v = unpacked("qkv", qkv, 3, "[B,L,3,H,D]")
    return flash_attn_func(
        *(q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap),
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> _Result:
    """`flash_attn_func` of N sequences, packed: q [Tq,Hq,D], k [Tk,Hkv,D], v [Tk,Hkv,Dv], cu_seqlens int32 [N+1].

    seqused_q, seqused_k: int32 [N]: how many of a sequence's tokens count; the others' out is 0, their lse -inf.
    Queries that count are copied.

    Returns:
        out [Tq,Hq,Dv]; with return_attn_probs (out, lse float32 [Hq,Tq]).

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention_varlen`, which calls q, k, v query, key, value;
        NotImplementedError: an argument that must be None.
    """
    refuse(_QV, qv=qv)
    refuse(_DESCALE, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out, lse = _packed.attend(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k),
        scale=softmax_scale,
        window=bounds(window_size, causal),
        softcap=softcap,
        chunk=attention_chunk,
    )
    return (out, lse) if return_attn_probs else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The union of attentions over disjoint keys.

    Args:
        out_partial: [parts,B,L,H,Dv]; lse_partial: float32 [parts,B,L,H].
        out: where the result goes, [B,L,H,Dv].
        out_dtype: of the result; None is that of out_partial.

    Returns:
        out [B,L,H,Dv], and lse [B,L,H].
    """
    parts = [(part.transpose(1, 2), lse.transpose(1, 2)) for part, lse in zip(out_partial, lse_partial, strict=True)]
    merged, lse = reduce(lambda a, b: merge_attention(*a, *b), parts)
    merged = merged.transpose(1, 2).to(out_dtype or out_partial.dtype)
    return merged if out is None else out.copy_(merged), lse.transpose(1, 2)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Appends k and v to the caches, in place, and attends over their live part.

    Args:
        rotary_seqlens: int32 [B]: the positions of the first new tokens; None is cache_seqlens.
        page_table: block_table in 2.8.
        cu_seqlens_q: int32 [B+1], with page_table: q is packed [Tq,Hq,D], and nothing is appended: k, v, rotary_cos,
            rotary_sin, cache_batch_idx and cache_leftpad must be None.
        max_seqlen_q: with cu_seqlens_q, no sequence of queries is longer; None is Tq.
        qv, q_descale, k_descale, v_descale, cu_seqlens_k_new, scheduler_metadata: must be None; attention_chunk: must
            be 0.
        pack_gqa, sm_margin: change nothing.
        The others: as in `mfa.flash_attn.flash_attn_with_kvcache`.

    Returns:
        out, as q; with return_softmax_lse (out, lse float32 [B,Hq,Lq] or [Hq,Tq], and two empty tensors where
        flash-attn has the parts of split keys).

    Raises:
        ValueError, TypeError, NotImplementedError: as there; NotImplementedError: an argument that must be None or 0.
    """
    refuse(_QV, qv=qv)
    refuse(_DESCALE, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    refuse("append before the call", cu_seqlens_k_new=cu_seqlens_k_new)
    refuse("kernels make their own plan", scheduler_metadata=scheduler_metadata)
    refuse("use flash_attn_varlen_func", attention_chunk=attention_chunk or None)
    if cu_seqlens_q is None:
        refuse("it belongs to cu_seqlens_q", max_seqlen_q=max_seqlen_q)
        out, lse = _cache.attend(
            *(q, k_cache, v_cache, k, v),
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            rotary_seqlens=rotary_seqlens,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            block_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            num_splits=num_splits,
        )
    else:
        rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_seqlens": rotary_seqlens}
        refuse("with cu_seqlens_q, append before the call", k=k, v=v, **rotary)
        refuse("use page_table", cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
        if page_table is None or not isinstance(cache_seqlens, Tensor):
            raise ValueError("with cu_seqlens_q, page_table and cache_seqlens must be tensors")
        out, lse = _packed.over_pages(
            *(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens),
            q.shape[0] if max_seqlen_q is None else max_seqlen_q,
            page_table.shape[-1] * k_cache.shape[1],
            block_table=page_table,
            scale=softmax_scale,
            window=bounds(window_size, causal),
            softcap=softcap,
        )
    return (out, lse, q.new_empty(0), q.new_empty(0)) if return_softmax_lse else out


def get_scheduler_metadata(*args: object, **kwargs: object) -> Tensor:
    """Raises NotImplementedError: there is nothing to plan ahead."""
    raise NotImplementedError("get_scheduler_metadata is not supported: kernels make their own plan; leave it away")


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, scale: float | None, window: Bounds, softcap: float
) -> tuple[Tensor, Tensor]:
    """Out [B,Lq,Hq,Dv] and lse [B,Hq,Lq]."""
    batch, length_q, length_k = q.shape[0], q.shape[1], k.shape[1]
    starts = [_packed.starts_of(batch, length, q.device) for length in (length_q, length_k)]
    out, lse = _packed.attend(
        *(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts[0], starts[1], length_q, length_k),
        scale=scale,
        window=window,
        softcap=softcap,
        chunk=chunk,
    )
    return out.unflatten(0, (batch, length_q)), lse.unflatten(1, (batch, length_q)).transpose(0, 1)
