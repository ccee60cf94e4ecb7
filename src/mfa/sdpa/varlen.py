"""The aten ops behind torch.nn.attention.varlen.varlen_attn, by mfa's ops. ATen itself has none for our devices.

Flash attention's conventions: heads come after lengths, a window of -1 is open, causal and windows are aligned to the
lower right of each sequence. The ops hand out and lse from forward to backward, and nothing else: 16-bit gradients feel
that out is rounded, which those of mfa's own ops don't.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._arguments import DENSE_GRADIENTS, VARLEN_GRADIENTS, Backward, Dense, Paged, Varlen
from .._ops import ops

_Bound = int | None
_Window = tuple[_Bound, _Bound]


def kernels(takes: Callable[[Tensor], bool]) -> dict[str, Callable[..., Any]]:
    """Kernel by the name of its op. `takes` says whether the device of a tensor is meant."""

    def forward(query: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        _check_taken(takes, query)
        out, lse = _forward(query, *arguments, **options)
        rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return out, lse, rng_state, rng_state.new_empty(()), query.new_empty(0)

    def forward_into(out: Tensor, query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        _check_taken(takes, query)
        result, lse = _forward(query, *arguments, **options)
        out.copy_(result)
        return lse

    def backward(grad_out: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        _check_taken(takes, grad_out)
        return _backward(grad_out, *arguments, **options)

    found: dict[str, Callable[..., Any]] = {
        "_flash_attention_forward": forward,
        "_flash_attention_forward_no_dropout_inplace": forward_into,  # torch 2.12 on
        "_flash_attention_backward": backward,
    }
    return {name: kernel for name, kernel in found.items() if hasattr(torch.ops.aten, name)}


def _check_taken(takes: Callable[[Tensor], bool], tensor: Tensor) -> None:
    if not takes(tensor):
        raise NotImplementedError(
            f"query is on {tensor.device}; varlen_attn takes mps tensors, and cpu tensors inside mfa.simulate() or "
            "after mfa.sdpa.enable(cpu=True)"
        )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: _Bound = None,
    window_size_right: _Bound = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p is {dropout_p}; varlen_attn has none: use mfa.attention_varlen")
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask is not supported: the probabilities are never in memory")
    window = _window(is_causal, window_size_left, window_size_right)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs: tuple[Tensor, Tensor]
    if block_table is not None:
        where = (cum_seq_q, (max_q, max_k), seqused_k, block_table)
        paged = _paged(query, (key, value), *where, alibi_slopes, scale, window, num_splits or 0)
        outputs = ops.attention_varlen_paged(*paged)
        return outputs
    # Dense kernels and packed ones split keys as they like.
    if cum_seq_q is None or cum_seq_k is None:
        if seqused_k is not None:
            raise NotImplementedError("seqused_k needs cu_seq_q and cu_seq_k, or block_table")
        _check_dense(cum_seq_q, cum_seq_k)
        out, lse = ops.attention_forward(*_dense(query, key, value, alibi_slopes, scale, window))
        return out.transpose(1, 2), lse
    layout = (cum_seq_q, cum_seq_k, max_q, max_k)
    packed = _packed(query, key, value, layout, alibi_slopes, scale, window)
    outputs = ops.attention_varlen_forward(*packed._replace(seqused_k=seqused_k))
    return outputs


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: _Bound = None,
    window_size_right: _Bound = None,
) -> tuple[Tensor, Tensor, Tensor]:
    window = _window(is_causal, window_size_left, window_size_right)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cum_seq_q is None or cum_seq_k is None:
        _check_dense(cum_seq_q, cum_seq_k)
        given = Backward(
            grad_out.transpose(1, 2), None, out.transpose(1, 2), logsumexp, None, _mask_of_rows(DENSE_GRADIENTS)
        )
        grads = ops.attention_backward(*_dense(query, key, value, None, scale, window), *given)
        query, key, value = (grad.transpose(1, 2) for grad in grads[:3])
        return query, key, value
    given = Backward(grad_out, None, out, logsumexp, None, _mask_of_rows(VARLEN_GRADIENTS))
    packed = _packed(query, key, value, (cum_seq_q, cum_seq_k, max_q, max_k), None, scale, window)
    query, key, value, *_ = ops.attention_varlen_backward(*packed, *given)
    return query, key, value


def _mask_of_rows(gradients: tuple[str, ...]) -> list[bool]:
    return [name in ("query", "key", "value") for name in gradients]


def _dense(
    query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None, scale: float, window: _Window
) -> Dense:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return Dense(query, key, value, None, None, alibi_slopes, scale, *window)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: tuple[Tensor, Tensor, int, int],
    alibi_slopes: Tensor | None,
    scale: float,
    window: _Window,
) -> Varlen:
    return Varlen(query, key, value, *layout, None, alibi_slopes, scale, *window)


def _paged(
    query: Tensor,
    pages: tuple[Tensor, Tensor],
    cum_seq_q: Tensor | None,
    longest: tuple[int, int],
    seqused_k: Tensor | None,
    block_table: Tensor,
    alibi_slopes: Tensor | None,
    scale: float,
    window: _Window,
    num_splits: int,
) -> Paged:
    if seqused_k is None or cum_seq_q is None:
        raise NotImplementedError("block_table needs seqused_k and cu_seq_q")
    key, value = (tensor.transpose(1, 2) for tensor in pages)
    places = (cum_seq_q, *longest, seqused_k, block_table, None, None)
    return Paged(query, key, value, *places, None, alibi_slopes, scale, *window, num_splits=num_splits)


def _window(is_causal: bool, left: _Bound, right: _Bound) -> _Window:
    left, right = (None if bound is None or bound < 0 else bound for bound in (left, right))
    return left, 0 if is_causal else right


def _check_dense(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None) -> None:
    if cum_seq_q is not None or cum_seq_k is not None:
        raise NotImplementedError("cum_seq_q and cum_seq_k must both be given, or neither")
