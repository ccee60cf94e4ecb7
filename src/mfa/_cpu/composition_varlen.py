"""Second derivatives of packed attention: `composition.py` on one sequence after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import composition, dropout
from .varlen import sequences


def backward_vjp(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """What the backward pass's results pass on to its arguments.

    Args:
        grad_out: [Tq,Hq,Dv]. grad_lse: [Hq,Tq].
        cotangents: of the gradients of query, key, value, sinks, alibi_slopes; None for one that nobody asked for.

    Returns:
        Gradients of grad_out, grad_lse, query, key, value, sinks, alibi_slopes; None for what wasn't given.
    """
    scalars = (scale, window_left, window_right, softcap)
    of_query, of_key, of_value, of_sinks, of_slopes = cotangents
    found = []
    for sequence in sequences(cu_seqlens_q, cu_seqlens_k):
        q, d_out = sequence.of_queries(query), sequence.of_queries(grad_out)
        k, v = sequence.of_keys(key), sequence.of_keys(value)
        d_lse = None if grad_lse is None else sequence.row_values(grad_lse)
        factors = dropout.all_factors(rng_state, dropout_p, q, k.shape[2], sequence.number)
        inputs = (q, k, v, None, sinks, sequence.slopes(alibi_slopes))
        passed = (
            None if of_query is None else sequence.of_queries(of_query),
            *(None if x is None else sequence.of_keys(x) for x in (of_key, of_value)),
            *(None, of_sinks, sequence.slopes(of_slopes)),
        )
        found.append((sequence, composition.backward_vjp(d_out, d_lse, inputs, scalars, factors, passed)))

    def packed(index: int, like: Tensor, by_keys: bool = False) -> Tensor:
        """Result `index` of each sequence, [1,H,L,X], as [T,H,X]; rows of no sequence are zeros."""
        pieces, end = [like[:0]], 0
        for sequence, results in found:
            rows, part = sequence.keys if by_keys else sequence.queries, results[index]
            assert part is not None
            pieces += [like.new_zeros(rows.start - end, *like.shape[1:]), part[0].transpose(0, 1)]
            end = rows.stop
        return torch.cat([*pieces, like.new_zeros(like.shape[0] - end, *like.shape[1:])])

    def summed(index: int, like: Tensor | None) -> Tensor | None:
        """Result `index` of all sequences; of slopes [N,H], each sequence's in its row."""
        if like is None:
            return None
        total = torch.zeros_like(like)
        for sequence, results in found:
            part = results[index]
            assert part is not None
            if like.dim() == 2:
                part = torch.nn.functional.pad(part[None], (0, 0, sequence.number, like.shape[0] - 1 - sequence.number))
            total = total + part
        return total

    return [
        packed(0, grad_out),
        None if grad_lse is None else packed(1, grad_lse.transpose(0, 1)).transpose(0, 1),
        packed(2, query),
        packed(3, key, by_keys=True),
        packed(4, value, by_keys=True),
        summed(6, sinks),
        summed(7, alibi_slopes),
    ]
