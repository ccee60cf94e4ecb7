"""Packed attention for CPU tensors: `forward.py` on one sequence after the other.

    for each sequence: out, lse <- attention of its rows of query, key and value

Rows that belong to no sequence, behind the last one, see nothing: out 0, lse -inf, gradients 0.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backward, forward
from .blocks import HIDDEN
from .layout import empty_correction


class Packed(NamedTuple):
    """One sequence: its number, and its rows of the query and of the key."""

    number: int
    queries: slice
    keys: slice

    def of_queries(self, tensor: Tensor) -> Tensor:
        """[Tq,H,X] as a view [1,H,Lq,X]."""
        return tensor[self.queries].transpose(0, 1).unsqueeze(0)

    def of_correction(self, tensor: Tensor | None) -> Tensor | None:
        """As `of_queries`; None if there is none."""
        return None if tensor is None or tensor.shape == (0,) else self.of_queries(tensor)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[Tk,H,X] as a view [1,H,Lk,X]."""
        return tensor[self.keys].transpose(0, 1).unsqueeze(0)

    def row_values(self, tensor: Tensor) -> Tensor:
        """[H,Tq] as a view [1,H,Lq]."""
        return tensor[:, self.queries].unsqueeze(0)

    def slopes(self, tensor: Tensor | None) -> Tensor | None:
        """[Hq] or [N,Hq] as [Hq]."""
        return tensor if tensor is None or tensor.dim() == 1 else tensor[self.number]


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Packed]:
    """The sequences that have queries."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(starts_q) - 1):
        if starts_q[n] < starts_q[n + 1]:
            yield Packed(n, slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1]))


def empty_outputs(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` [Tq,Hq,Dv] and `lse` float32 [Hq,Tq], contiguous on every backend."""
    tokens, heads, _ = query.shape
    out = query.new_empty((tokens, heads, value_dim))
    return out, query.new_empty((heads, tokens), dtype=torch.float32)


def attention_varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    *,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mfa::attention_varlen_forward` for CPU tensors. The caller has checked the arguments, and the starts.

    Args:
        query: [Tq,Hq,D], any strides; float16, bfloat16, float32 or float64.
        key, value: [Tk,Hkv,D] and [Tk,Hkv,Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [N+1].
        sinks: [Hq]. alibi_slopes: [Hq] or [N,Hq].
        window_left, window_right: relative to each sequence's lower-right diagonal, None = open.
        rng_state: int64 [2], what dropout starts from; it counts sequences as batches.
        correction: zeros of `empty_correction`; gets what rounding takes from out.

    Returns:
        out [Tq,Hq,Dv] and lse float32 [Hq,Tq].
    """
    out, lse = empty_outputs(query, value.shape[2])
    end = int(cu_seqlens_q[-1])
    out[end:] = 0
    lse[:, end:] = HIDDEN
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k):
        tensors = sequence.of_queries(query), sequence.of_keys(key), sequence.of_keys(value)
        slopes = sequence.slopes(alibi_slopes)
        sequence_out, sequence_lse = forward.attention_forward(
            *tensors,
            None,
            sinks,
            slopes,
            scale,
            window_left,
            window_right,
            softcap,
            dropout_p,
            rng_state,
            first_batch=sequence.number,
            correction=sequence.of_correction(correction),
        )
        sequence.of_queries(out).copy_(sequence_out)
        sequence.row_values(lse).copy_(sequence_lse)
    return out, lse


def attention_varlen_forward_with_correction(
    query: Tensor, key: Tensor, value: Tensor, *terms: Any
) -> tuple[Tensor, ...]:
    """`attention_varlen_forward`, whose arguments these are, and what rounding took from out."""
    correction = empty_correction(empty_outputs(query, value.shape[2])[0]).zero_()
    return *attention_varlen_forward(query, key, value, *terms, correction=correction), correction


def attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: Sequence[bool],
    correction: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of `attention_varlen_forward`, whose arguments these are.

    Args:
        grad_out: [Tq,Hq,Dv]. grad_lse: float32 [Hq,Tq].
        out, lse, correction: what it returned.
        output_mask: which of the five gradients are wanted.

    Returns:
        Gradients of query, key, value, sinks, alibi_slopes, each in its tensor's shape and dtype, contiguous; None for
        one that isn't wanted, or whose tensor wasn't given.
    """
    inputs = (query, key, value, sinks, alibi_slopes)
    wide = torch.promote_types(query.dtype, torch.float32)
    # What is summed over sequences is kept in the dtype of the scores until the end.
    grads = [
        torch.zeros(tensor.shape, dtype=tensor.dtype if i < 3 else wide) if wanted and tensor is not None else None
        for i, (tensor, wanted) in enumerate(zip(inputs, output_mask, strict=True))
    ]
    grad_query, grad_key, grad_value, grad_sinks, grad_slopes = grads
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k):
        tensors = sequence.of_queries(query), sequence.of_keys(key), sequence.of_keys(value)
        part_query, part_key, part_value, _, part_sinks, part_slopes = backward.attention_backward(
            sequence.of_queries(grad_out),
            None if grad_lse is None else sequence.row_values(grad_lse),
            *tensors,
            sequence.of_queries(out),
            sequence.row_values(lse),
            None,
            sinks,
            sequence.slopes(alibi_slopes),
            scale,
            window_left,
            window_right,
            softcap,
            dropout_p,
            rng_state,
            (*output_mask[:3], False, *output_mask[3:]),
            sequence.of_correction(correction),
            first_batch=sequence.number,
        )
        if grad_query is not None and part_query is not None:
            sequence.of_queries(grad_query).copy_(part_query)
        for grad, part in ((grad_key, part_key), (grad_value, part_value)):
            if grad is not None and part is not None:
                sequence.of_keys(grad).copy_(part)
        if grad_sinks is not None and part_sinks is not None:
            grad_sinks += part_sinks
        if grad_slopes is not None and part_slopes is not None:
            target = grad_slopes if grad_slopes.dim() == 1 else grad_slopes[sequence.number]
            target += part_slopes
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, inputs, strict=True)
    ]
