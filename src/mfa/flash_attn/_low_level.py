"""flash-attn's functions below autograd, which ring attention and others call: forward hands its results to backward.

Backward takes the out and lse that it is given, as ring attention needs: those of all keys, while k and v are some. In
16 bits it feels that out is rounded, which the gradients of `flash_attn_func` don't.
"""

import torch
from torch import Tensor

from .._arguments import Backward, Dense, Varlen
from .._ops import ops
from . import _packed
from ._conventions import bounds, check_probs, heads_first

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
]

_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> _Results:
    """`flash_attn_func`, with what backward needs.

    Returns:
        out [B,Lq,Hq,Dv], lse float32 [B,Hq,Lq], an empty tensor where flash-attn has its dropout pattern, and rng_state
        int64 [2].

    Raises:
        RuntimeError: what `flash_attn_func` refuses; NotImplementedError: return_softmax together with dropout_p.
    """
    check_probs("return_softmax", return_softmax, dropout_p)
    query, key, value = heads_first("q", q), heads_first("k", k), heads_first("v", v)
    window = bounds((window_size_left, window_size_right), causal)
    rng_state = _new_state(q, dropout_p)
    used = _used(rng_state, dropout_p)
    out, lse = ops.attention_forward(
        *Dense(query, key, value, None, None, alibi_slopes, softmax_scale, *window, softcap, dropout_p, used)
    )
    return out.transpose(1, 2), lse, q.new_empty(0), rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients into those of dq, dk and dv that are given, each of the shape of q, k, v.

    Args:
        dout: [B,Lq,Hq,Dv], as out.
        deterministic: changes nothing: results always are.
        rng_state: what forward returned; with dropout_p.
        The others: as in `_flash_attn_forward`, and what it returned.

    Returns:
        The sums of dout*out, float32 [B,Hq,Lq]; flash-attn pads them.
    """
    query, key, value = heads_first("q", q), heads_first("k", k), heads_first("v", v)
    grad_out, outs = heads_first("dout", dout), heads_first("out", out)
    window = bounds((window_size_left, window_size_right), causal)
    used = _used(rng_state, dropout_p)
    wanted = [result is not None for result in (dq, dk, dv)]
    grads = ops.attention_backward(
        *Dense(query, key, value, None, None, alibi_slopes, softmax_scale, *window, softcap, dropout_p, used),
        *Backward(grad_out, None, outs, softmax_lse, None, [*wanted, False, False, False]),
    )
    for result, grad in zip((dq, dk, dv), grads, strict=False):
        if result is not None:
            result.copy_(grad.transpose(1, 2))
    return (dout.float() * out.float()).sum(-1).transpose(1, 2)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> _Results:
    """`flash_attn_varlen_func`, with what backward needs.

    Args:
        seqused_k, leftpad_k: int32 [N]: a sequence's keys are those within leftpad_k ... seqused_k-1; with leftpad_k,
            which must be None for pages, they are copied.
        zero_tensors: changes nothing: every element is written.
        The others: as in `flash_attn_varlen_func`.

    Returns:
        out [Tq,Hq,Dv], lse float32 [Hq,Tq], an empty tensor, and rng_state int64 [2].

    Raises:
        As `_flash_attn_forward`; ValueError: contents of index tensors, where the host can see them.
    """
    check_probs("return_softmax", return_softmax, dropout_p)
    window = bounds((window_size_left, window_size_right), causal)
    if block_table is not None:
        if leftpad_k is not None:
            raise ValueError("leftpad_k is given, and block_table too; it must be None for pages")
        out, lse = _packed.over_pages(
            *(q, k, v, cu_seqlens_q, _packed.lengths_of(q, cu_seqlens_k, seqused_k), max_seqlen_q, max_seqlen_k),
            block_table=block_table,
            scale=softmax_scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
        )
        return out, lse, q.new_empty(0), _new_state(q, 0)
    _packed.check_queries(q, cu_seqlens_q, max_seqlen_q)
    _packed.check_keys(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, seqused_k)
    starts_k = cu_seqlens_k
    if leftpad_k is not None:
        (k, v), starts_k = _packed.compacted((k, v), cu_seqlens_k, seqused_k, leftpad_k, what="k")
        seqused_k = None
    rng_state = _new_state(q, dropout_p)
    used, layout = _used(rng_state, dropout_p), (cu_seqlens_q, starts_k, max_seqlen_q, max_seqlen_k)
    out, lse = ops.attention_varlen_forward(
        *Varlen(q, k, v, *layout, None, alibi_slopes, softmax_scale, *window, softcap, dropout_p, used, seqused_k)
    )
    return out, lse, q.new_empty(0), rng_state


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed sequences: dout and out [Tq,Hq,Dv], lse [Hq,Tq], which the sums are like."""
    _packed.check_queries(q, cu_seqlens_q, max_seqlen_q)
    _packed.check_keys(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
    window = bounds((window_size_left, window_size_right), causal)
    wanted = [result is not None for result in (dq, dk, dv)]
    used, layout = _used(rng_state, dropout_p), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = ops.attention_varlen_backward(
        *Varlen(q, k, v, *layout, None, alibi_slopes, softmax_scale, *window, softcap, dropout_p, used),
        *Backward(dout, None, out, softmax_lse, None, [*wanted, False, False]),
    )
    for result, grad in zip((dq, dk, dv), grads, strict=False):
        if result is not None:
            result.copy_(grad)
    return (dout.float() * out.float()).sum(-1).transpose(0, 1)


# flash-attn's custom ops of the functions above, by the names under which others import them.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _new_state(like: Tensor, dropout_p: float) -> Tensor:
    """Drawn as `mfa.attention` draws it, so that torch.manual_seed gives both the same pattern."""
    if dropout_p == 0:
        return torch.zeros(2, dtype=torch.int64, device=like.device)
    return torch.randint(2**31 - 1, (2,), dtype=torch.int64, device=like.device)


def _used(rng_state: Tensor | None, dropout_p: float) -> Tensor | None:
    return rng_state if dropout_p > 0 else None
