"""Second derivatives of packed attention: `composition.py` on one sequence after the other."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._arguments import Varlen
from . import composition
from .varlen import sequences


def backward_vjp(
    arguments: Varlen, grad_out: Tensor, grad_lse: Tensor | None, cotangents: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """What the backward pass's results pass on to its arguments.

    Args:
        grad_out: [Tq,Hq,Dv]. grad_lse: [Hq,Tq].
        cotangents: of the gradients, by the names in VARLEN_GRADIENTS; None or missing where nobody asked for one.

    Returns:
        Gradients of grad_out, grad_lse and those arguments, by their names; none for what wasn't given.
    """
    found = []
    for sequence in sequences(arguments):
        views = {
            "query": sequence.of_queries,
            "key": sequence.of_keys,
            "value": sequence.of_keys,
            "sinks": lambda tensor: tensor,
            "alibi_slopes": sequence.slopes,
        }
        passed = {name: None if tensor is None else views[name](tensor) for name, tensor in cotangents.items()}
        d_out, d_lse = sequence.of_queries(grad_out), None if grad_lse is None else sequence.row_values(grad_lse)
        dense = sequence.dense(arguments)
        found.append((sequence, composition.backward_vjp(dense, d_out, d_lse, passed, sequence.number)))

    def packed(name: str, like: Tensor) -> Tensor:
        """Result `name` of each sequence, [1,H,L,X], as [T,H,X]; rows of no sequence are zeros."""
        pieces, end = [like[:0]], 0
        for sequence, results in found:
            rows = sequence.keys if name in ("key", "value") else sequence.queries
            pieces += [like.new_zeros(rows.start - end, *like.shape[1:]), results[name][0].transpose(0, 1)]
            end = rows.stop
        return torch.cat([*pieces, like.new_zeros(like.shape[0] - end, *like.shape[1:])])

    def summed(name: str, like: Tensor) -> Tensor:
        """Result `name` of all sequences; of slopes [N,H], each sequence's in its row."""
        total = torch.zeros_like(like)
        for sequence, results in found:
            part = results[name]
            if like.dim() == 2:
                part = torch.nn.functional.pad(part[None], (0, 0, sequence.number, like.shape[0] - 1 - sequence.number))
            total = total + part
        return total

    gradients = {"grad_out": packed("grad_out", grad_out)}
    if grad_lse is not None:
        gradients["grad_lse"] = packed("grad_lse", grad_lse.transpose(0, 1)).transpose(0, 1)
    gradients |= {name: packed(name, getattr(arguments, name)) for name in ("query", "key", "value")}
    for name, tensor in (("sinks", arguments.sinks), ("alibi_slopes", arguments.alibi_slopes)):
        if tensor is not None:
            gradients[name] = summed(name, tensor)
    return gradients
