"""Ops of packed sequences."""

import itertools
from typing import Any

from torch import Tensor

from .._arguments import VARLEN_GRADIENTS, Varlen
from .._checks.indices import host_values
from .._checks.varlen import check_forward, check_starts
from .._cpu.composition_varlen import backward_vjp
from .._cpu.varlen import (
    attention_varlen_backward,
    attention_varlen_forward,
    attention_varlen_forward_with_correction,
    empty_outputs,
)
from .differentiable import register
from .family import Family, Given, Mapped, Outputs

# Heads: 1 in packed rows [T,H,X], 0 in [H,T], and last in [H] or [N,H].
_HEADS = {
    **dict.fromkeys(("query", "key", "value", "out", "correction", "grad_out"), 1),
    **dict.fromkeys(("lse", "grad_lse"), 0),
    **dict.fromkeys(("sinks", "alibi_slopes"), -1),
}


def _shapes(arguments: Varlen) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokens, heads, _ = arguments.query.shape
    return (tokens, heads, arguments.value.shape[2]), (heads, tokens)


def _empty_outputs(arguments: Varlen) -> Outputs:
    return empty_outputs(arguments.query, arguments.value.shape[2])


# -- vmap: the mapped dimension becomes part of the heads -----------------------------------------------------------


def _folds(dims: Mapped, given: Given) -> bool:
    # All have the same lengths; dropout counts heads.
    shared = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    return all(dims[name] is None for name in shared) and given["dropout_p"] == 0


def _fold(size: int, dims: Mapped, given: Given) -> list[Any]:
    return [
        _folded(size, _HEADS[name], dims[name], value) if name in _HEADS and value is not None else value
        for name, value in given.items()
    ]


def _place(result: str) -> int:
    return _HEADS[result.removeprefix("grad_")]


def _folded(size: int, heads: int, dim: int | None, tensor: Tensor) -> Tensor:
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    if heads == -1:
        return tensor.movedim(0, -2).flatten(-2)
    return tensor.movedim(0, heads).flatten(heads, heads + 1)


def _pairs(arguments: Varlen) -> int:
    """Exactly where the host sees the lengths, and at most elsewhere."""
    heads: int = arguments.query.shape[1]
    starts_q, starts_k = host_values(arguments.cu_seqlens_q), host_values(arguments.cu_seqlens_k)
    used = None if arguments.seqused_k is None else host_values(arguments.seqused_k)
    if starts_q is not None and starts_k is not None:
        lengths_q, lengths_k = ([b - a for a, b in itertools.pairwise(starts)] for starts in (starts_q, starts_k))
        pairs: int = sum(q * k for q, k in zip(lengths_q, used or lengths_k, strict=True))
        return heads * pairs
    queries, keys = arguments.query.shape[0], arguments.key.shape[0]
    longest_q, longest_k = arguments.max_seqlen_q, arguments.max_seqlen_k
    sequences = arguments.cu_seqlens_q.shape[0] - 1
    most: int = min(queries * longest_k, keys * longest_q, sequences * longest_q * longest_k)
    return heads * most


register(
    Family(
        name="attention_varlen",
        arguments=Varlen,
        gradients=VARLEN_GRADIENTS,
        check=check_forward,
        check_contents=check_starts,
        shapes=_shapes,
        empty_outputs=_empty_outputs,
        forward=attention_varlen_forward,
        forward_with_correction=attention_varlen_forward_with_correction,
        backward=attention_varlen_backward,
        backward_vjp=backward_vjp,
        folds=_folds,
        fold=_fold,
        place=_place,
        pairs=_pairs,
    )
)
