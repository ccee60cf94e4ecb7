"""Ops of packed sequences."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._arguments import VARLEN_GRADIENTS, Backward, Varlen
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
from .family import Corrected, Family, Outputs

# Heads: 1 in packed rows [T,H,X], 0 in [H,T], and last in [H] or [N,H].
_HEADS = {
    **dict.fromkeys(("query", "key", "value", "out", "correction", "grad_out"), 1),
    **dict.fromkeys(("lse", "grad_lse"), 0),
    **dict.fromkeys(("sinks", "alibi_slopes"), -1),
}


class _Varlen(Family[Varlen]):
    name = "attention_varlen"
    arguments = Varlen
    gradients = VARLEN_GRADIENTS

    def check(self, arguments: Varlen, *, metal: bool) -> None:
        check_forward(arguments, metal=metal)

    def check_contents(self, arguments: Varlen) -> None:
        check_starts(arguments)

    def shapes(self, arguments: Varlen) -> tuple[tuple[int, ...], tuple[int, ...]]:
        tokens, heads, _ = arguments.query.shape
        return (tokens, heads, arguments.value.shape[2]), (heads, tokens)

    def empty_outputs(self, arguments: Varlen) -> Outputs:
        return empty_outputs(arguments.query, arguments.value.shape[2])

    def forward(self, arguments: Varlen) -> Outputs:
        return attention_varlen_forward(arguments)

    def forward_with_correction(self, arguments: Varlen) -> Corrected:
        return attention_varlen_forward_with_correction(arguments)

    def backward(self, arguments: Varlen, given: Backward) -> Mapping[str, Tensor]:
        return attention_varlen_backward(arguments, given)

    def backward_vjp(
        self, arguments: Varlen, grad_out: Tensor, grad_lse: Tensor | None, cotangents: Mapping[str, Tensor | None]
    ) -> Mapping[str, Tensor]:
        return backward_vjp(arguments, grad_out, grad_lse, cotangents)

    def folds(self, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> bool:
        # All have the same starts; dropout counts heads.
        return dims["cu_seqlens_q"] is None and dims["cu_seqlens_k"] is None and given["dropout_p"] == 0

    def fold(self, size: int, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> list[Any]:
        """The mapped dimension becomes part of the heads."""
        return [
            _folded(size, _HEADS[name], dims[name], value) if name in _HEADS and value is not None else value
            for name, value in given.items()
        ]

    def place(self, result: str) -> int:
        return _HEADS[result.removeprefix("grad_")]

    def pairs(self, arguments: Varlen) -> int:
        return arguments.query.shape[1] * _pairs(arguments)


def _folded(size: int, heads: int, dim: int | None, tensor: Tensor) -> Tensor:
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    if heads == -1:
        return tensor.movedim(0, -2).flatten(-2)
    return tensor.movedim(0, heads).flatten(heads, heads + 1)


def _pairs(arguments: Varlen) -> int:
    """How many (query, key) there are: exactly where the host sees the lengths, and at most elsewhere."""
    starts = host_values(arguments.cu_seqlens_q), host_values(arguments.cu_seqlens_k)
    if starts[0] is not None and starts[1] is not None:
        lengths = [[b - a for a, b in itertools.pairwise(s)] for s in starts if s is not None]
        return sum(q * k for q, k in zip(*lengths, strict=True))
    queries, keys = arguments.query.shape[0], arguments.key.shape[0]
    longest_q, longest_k = arguments.max_seqlen_q, arguments.max_seqlen_k
    sequences = arguments.cu_seqlens_q.shape[0] - 1
    return min(queries * longest_k, keys * longest_q, sequences * longest_q * longest_k)


register(_Varlen())
