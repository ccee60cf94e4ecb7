"""What the ops' rules for torch.vmap share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]
Results = tuple[tuple[Tensor, ...], Dims]


def one_by_one(op: Any, size: int, in_dims: Dims, args: Sequence[Any]) -> Results:
    """A call for each mapped element."""
    results = [
        op(*(arg.select(dim, index) if isinstance(dim, int) else arg for dim, arg in zip(in_dims, args, strict=True)))
        for index in range(size)
    ]
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True)), (0,) * len(results[0])


def unfolded(size: int, place: int, tensor: Tensor) -> tuple[Tensor, int]:
    """A result whose dimension `place` holds the mapped one, and where that is then; an unwanted one has size 0."""
    if tensor.shape == (0,):
        return tensor.expand(size, 0), 0
    place %= tensor.dim()
    return tensor.unflatten(place, (size, -1)), place
