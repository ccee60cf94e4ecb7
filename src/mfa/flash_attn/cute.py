"""FlashAttention-4's module flash_attn.cute, as far as mfa's kernels go.

Other than in 2.8, a window's open side is None, and functions return (out, lse). What changes a result and isn't
supported is refused by name: qv, gather_kv_indices, functions of scores and masks, block sparsity.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from . import _packed
from ._conventions import Bounds, heads_first, refuse

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

_Window = Sequence[int | None]
_Result = tuple[Tensor, Tensor | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> _Result:
    """softmax(scale * Q K' + mask) V, in the layout of flash-attn.

    Args:
        q: [B,Lq,Hq,D]; k: [B,Lk,Hkv,D]; v: [B,Lk,Hkv,Dv]. Hq is a multiple of Hkv.
        softmax_scale: of the scores; None is 1/sqrt(D).
        causal: query i sees key j iff j <= i+Lk-Lq.
        window_size: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right. None is open, and
            two negative bounds are; one counts as it is.
        learnable_sink: [Hq], float32 or q's dtype (also bfloat16): one more logit per head, without a value.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap).
        num_splits, pack_gqa, deterministic: change nothing: the kernels choose, and results are always deterministic.
        return_lse: also return the lse.
        The others: must be None or False.

    Returns:
        out [B,Lq,Hq,Dv], and lse float32 [B,Hq,Lq], None without return_lse.

    Raises:
        ValueError, TypeError, NotImplementedError: as `mfa.attention`, which calls q, k, v, learnable_sink query, key,
        value, sinks; NotImplementedError: an argument that must be None or False.
    """
    _refuse(qv, gather_kv_indices, gather_bwd_recompute_p, gather_bwd_token_chunk)
    _refuse_functions(score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    refuse("use window_size", block_sparse_tensors_bwd=block_sparse_tensors_bwd)
    out, lse = attention(
        heads_first("q", q),
        heads_first("k", k),
        heads_first("v", v),
        scale=softmax_scale,
        enable_gqa=True,
        window=_bounds(window_size, causal),
        softcap=softcap or 0,
        sinks=_sinks(learnable_sink, q),
        return_lse=True,
    )
    return out.transpose(1, 2), lse if return_lse else None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> _Result:
    """`flash_attn_func` of N sequences of different lengths.

    Args:
        q: packed [Tq,Hq,D] with cu_seqlens_q, or [N,Lq,Hq,D] without.
        k, v: packed [Tk,Hkv,D] and [Tk,Hkv,Dv] with cu_seqlens_k; pages [pages,page,Hkv,D] with page_table and
            seqused_k or cu_seqlens_k; or [N,Lk,Hkv,D].
        cu_seqlens_q, cu_seqlens_k: int32 [N+1].
        max_seqlen_q, max_seqlen_k: no sequence is longer; None is all tokens there are.
        seqused_q, seqused_k: int32 [N]: how many of a sequence's tokens count; the others' out is 0, their lse -inf.
            Queries that count are copied.
        page_table: int32 [N,pages per sequence]; a page is a multiple of 8. No gradients then.
        min_seqlen_k, disable_scheduler_metadata, seqlen_k_per_split: change nothing.
        scheduler_metadata: must be None.
        The others: as in `flash_attn_func`.

    Returns:
        out, of q's shape with Dv; lse float32 [Hq,Tq] or [N,Hq,Lq], None without return_lse.
    """
    _refuse(qv, gather_kv_indices, gather_bwd_recompute_p, gather_bwd_token_chunk)
    _refuse_functions(score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors)
    refuse("kernels make their own plan", scheduler_metadata=scheduler_metadata)
    rows = None if cu_seqlens_q is not None else q.shape[:2]
    (q,), cu_seqlens_q, max_seqlen_q = _packed_form("q", (q,), cu_seqlens_q, max_seqlen_q)
    if page_table is None:
        (k, v), cu_seqlens_k, max_seqlen_k = _packed_form("k", (k, v), cu_seqlens_k, max_seqlen_k)
    elif max_seqlen_k is None:
        max_seqlen_k = k.shape[1] * page_table.shape[1]
    out, lse = _packed.attend(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k),
        scale=softmax_scale,
        window=_bounds(window_size, causal),
        softcap=softcap or 0,
        sinks=_sinks(learnable_sink, q),
        block_table=page_table,
    )
    if rows is not None:
        out, lse = out.unflatten(0, rows), lse.unflatten(1, rows).transpose(0, 1)
    return out, lse if return_lse else None


def _packed_form(
    name: str, tensors: tuple[Tensor, ...], starts: Tensor | None, longest: int | None
) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """Tensors [T,H,D], their cu_seqlens and the longest length."""
    first = tensors[0]
    if starts is not None:
        return tensors, starts, first.shape[0] if longest is None else longest
    for tensor in tensors:
        heads_first(name, tensor)  # which checks it
    flat = tuple(tensor.flatten(0, 1) for tensor in tensors)
    return flat, _packed.starts_of(first.shape[0], first.shape[1], first.device), first.shape[1]


def _bounds(window_size: _Window, causal: bool) -> Bounds:
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise TypeError(f"window_size is {window_size!r}; it must be a pair (left, right)")
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return left, 0 if causal else right


def _sinks(sink: Tensor | None, q: Tensor) -> Tensor | None:
    """FA4 takes bfloat16 for any q; mfa takes float32 or q's dtype."""
    return sink.float() if sink is not None and sink.dtype == torch.bfloat16 != q.dtype else sink


def _refuse(qv: object, indices: object, recompute_p: bool, token_chunk: object) -> None:
    refuse("concatenate q and qv, k and v along D", qv=qv)
    refuse(
        "give each query its keys by window_size",
        gather_kv_indices=indices,
        gather_bwd_recompute_p=recompute_p or None,
        gather_bwd_token_chunk=token_chunk,
    )


def _refuse_functions(
    score_mod: object, score_mod_bwd: object, mask_mod: object, tensors: object, scalars: object, blocks: object
) -> None:
    refuse(
        "use softcap, window_size, or block_mask of mfa.attention, with mfa.masks.document for packed sequences",
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod,
        aux_tensors=tensors,
        aux_scalars=scalars,
        block_sparse_tensors=blocks,
    )
