"""The problems that benchmarks are about, in suites as others publish them."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUITES: dict[str, dict[str, list[Any]]] = {
    # The problem that mps-flash-attn published timings of, and its neighbours.
    "seed": {"batch": [4], "heads": [8], "length": [512, 1024, 2048, 4096], "dim": [64], "causal": [False, True]},
    # The tables of flash-attention: 16k tokens, a hidden size of 2048.
    "flash": {"tokens": [16384], "length": [512, 1024, 2048, 4096, 8192, 16384], "dim": [64, 128, 256]},
    "quick": {"batch": [1], "heads": [4], "length": [256, 1024], "dim": [64], "causal": [False, True]},
}


class Case(NamedTuple):
    """One problem: self-attention of [batch, heads, length, dim]."""

    dtype: str
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        causal = " causal" if self.causal else ""
        return f"{self.dtype} B{self.batch} H{self.heads} L{self.length} D{self.dim}{causal}"

    def operations(self, is_training: bool) -> float:
        """As flash-attention counts: 4 L^2 D per head, halved if causal, and 2.5 times that for the backward pass."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.dim * (0.5 if self.causal else 1)
        return forward * (3.5 if is_training else 1)

    def compulsory_bytes(self, is_training: bool) -> int:
        """What must move however it is computed: Q, K, V and O; then those, dO and three gradients."""
        tensor = self.batch * self.heads * self.length * self.dim * getattr(torch, self.dtype).itemsize
        return int(tensor) * (12 if is_training else 4)


def cases(suite: str, dtypes: Sequence[str], lengths: Sequence[int] = (), dims: Sequence[int] = ()) -> list[Case]:
    """Those of a suite, with other lengths or head dimensions where they are given."""
    axes = SUITES[suite]
    lengths, dims = list(lengths) or axes["length"], list(dims) or axes["dim"]
    if "tokens" in axes:
        tokens = axes["tokens"][0]
        return [
            Case(dtype, max(1, tokens // length), max(1, 2048 // dim), length, dim, causal)
            for dtype, dim, causal, length in itertools.product(dtypes, dims, (False, True), lengths)
        ]
    products = itertools.product(dtypes, axes["batch"], axes["heads"], lengths, dims, axes["causal"])
    return [Case(*axis) for axis in products]


def tensors(case: Case, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    torch.manual_seed(0)
    shape = (case.batch, case.heads, case.length, case.dim)
    query, key, value = (
        torch.randn(shape, device=device, dtype=getattr(torch, case.dtype), requires_grad=requires_grad)
        for _ in range(3)
    )
    return query, key, value
