"""Packed attention for CPU tensors: `forward.py` on one sequence after the other.

    for each sequence: out, lse <- attention of its rows of query, key and value

Rows that belong to no sequence, behind the last one, see nothing: out 0, lse -inf, gradients 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import DENSE_GRADIENTS, VARLEN_GRADIENTS, Backward, Dense, Varlen
from . import backward, forward
from .backward import wanted_inputs
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

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[Tk,H,X] as a view [1,H,Lk,X]."""
        return tensor[self.keys].transpose(0, 1).unsqueeze(0)

    def row_values(self, tensor: Tensor) -> Tensor:
        """[H,Tq] as a view [1,H,Lq]."""
        return tensor[:, self.queries].unsqueeze(0)

    def slopes(self, tensor: Tensor | None) -> Tensor | None:
        """[Hq] or [N,Hq] as [Hq]."""
        return tensor if tensor is None or tensor.dim() == 1 else tensor[self.number]

    def dense(self, arguments: Varlen) -> Dense:
        """A problem of its own, of views."""
        return Dense(
            query=self.of_queries(arguments.query),
            key=self.of_keys(arguments.key),
            value=self.of_keys(arguments.value),
            bias=None,
            sinks=arguments.sinks,
            alibi_slopes=self.slopes(arguments.alibi_slopes),
            scale=arguments.scale,
            window_left=arguments.window_left,
            window_right=arguments.window_right,
            softcap=arguments.softcap,
            dropout_p=arguments.dropout_p,
            rng_state=arguments.rng_state,
        )

    def backward(self, backward: Backward) -> Backward:
        """What belongs to `dense`."""
        wanted = dict(zip(VARLEN_GRADIENTS, backward.output_mask, strict=True))
        return Backward(
            grad_out=self.of_queries(backward.grad_out),
            grad_lse=None if backward.grad_lse is None else self.row_values(backward.grad_lse),
            out=self.of_queries(backward.out),
            lse=self.row_values(backward.lse),
            correction=None if backward.correction is None else self.of_queries(backward.correction),
            output_mask=[wanted.get(name, False) for name in DENSE_GRADIENTS],
        )


def sequences(arguments: Varlen) -> Iterator[Packed]:
    """The sequences that have queries."""
    starts_q, starts_k = arguments.cu_seqlens_q.tolist(), arguments.cu_seqlens_k.tolist()
    ends_k = starts_k[1:]
    if arguments.seqused_k is not None:
        ends_k = [start + used for start, used in zip(starts_k, arguments.seqused_k.tolist(), strict=False)]
    for n, end in enumerate(ends_k):
        if starts_q[n] < starts_q[n + 1]:
            yield Packed(n, slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], end))


def empty_outputs(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` [Tq,Hq,Dv] and `lse` float32 [Hq,Tq], contiguous on every backend."""
    tokens, heads, _ = query.shape
    out = query.new_empty((tokens, heads, value_dim))
    return out, query.new_empty((heads, tokens), dtype=torch.float32)


def attention_varlen_forward(arguments: Varlen, *, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`mfa::attention_varlen_forward` for CPU tensors. The caller has checked the arguments, and the starts.

    Args:
        correction: zeros of `empty_correction`; gets what rounding takes from out.

    Returns:
        out [Tq,Hq,Dv] and lse float32 [Hq,Tq].
    """
    out, lse = empty_outputs(arguments.query, arguments.value.shape[2])
    end = int(arguments.cu_seqlens_q[-1])
    out[end:] = 0
    lse[:, end:] = HIDDEN
    for sequence in sequences(arguments):
        sequence_out, sequence_lse = forward.attention_forward(
            sequence.dense(arguments),
            first_batch=sequence.number,
            correction=None if correction is None or correction.numel() == 0 else sequence.of_queries(correction),
        )
        sequence.of_queries(out).copy_(sequence_out)
        sequence.row_values(lse).copy_(sequence_lse)
    return out, lse


def attention_varlen_forward_with_correction(arguments: Varlen) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_varlen_forward`, and what rounding took from out."""
    correction = empty_correction(empty_outputs(arguments.query, arguments.value.shape[2])[0]).zero_()
    return *attention_varlen_forward(arguments, correction=correction), correction


def attention_varlen_backward(arguments: Varlen, given: Backward) -> dict[str, Tensor]:
    """Gradients of `attention_varlen_forward`.

    Returns:
        Those that are wanted, of tensors that were given, by the names in VARLEN_GRADIENTS; each in its tensor's shape
        and dtype, contiguous.
    """
    wide = torch.promote_types(arguments.query.dtype, torch.float32)
    inputs = wanted_inputs(arguments, VARLEN_GRADIENTS, given.output_mask)
    # What is summed over sequences is kept in the dtype of the scores until the end.
    grads = {
        name: torch.zeros(tensor.shape, dtype=wide if name in ("sinks", "alibi_slopes") else tensor.dtype)
        for name, tensor in inputs.items()
    }
    for sequence in sequences(arguments):
        found = backward.attention_backward(
            sequence.dense(arguments), sequence.backward(given), first_batch=sequence.number
        )
        for name, part in found.items():
            if name == "query":
                sequence.of_queries(grads[name]).copy_(part)
            elif name in ("key", "value"):
                sequence.of_keys(grads[name]).copy_(part)
            elif name == "alibi_slopes" and grads[name].dim() == 2:
                grads[name][sequence.number] += part
            else:
                grads[name] += part
    return {name: grad.to(inputs[name].dtype) for name, grad in grads.items()}
