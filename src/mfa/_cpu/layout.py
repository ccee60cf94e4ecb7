"""How results lie in memory, the same on every backend; fake tensors and CPU kernels make them here."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._checks.sizes import is_known

_HALF_MAX = torch.finfo(torch.float16).max


def empty_outputs(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` [B,Hq,Lq,Dv] and `lse` float32 [B,Hq,Lq], laid out as every backend lays them out.

    Both are contiguous, except that `out` is B,L,H,D in memory when the query is.
    """
    batch, heads, length, _ = query.shape
    if is_transposed(query):
        out = query.new_empty((batch, length, heads, value_dim)).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, length, value_dim))
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


def empty_correction(out: Tensor) -> Tensor:
    """An uninitialised tensor for what rounding takes from `out`: float16, its shape; of size 0 for wider types."""
    half = torch.float16
    return torch.empty_like(out, dtype=half) if out.dtype.itemsize == 2 else out.new_empty(0, dtype=half)


def lost_to_rounding(exact: Tensor, out: Tensor) -> Tensor:
    """What a correction holds, in the dtype of `exact`."""
    return (exact - out).clamp_(-_HALF_MAX, _HALF_MAX)


def empty_gradients(inputs: Mapping[str, Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of query, key, value and the other inputs, laid out as every backend lays them out.

    Those of query, key and value are B,L,H,D in memory when the tensor is, others contiguous; shape [0] for what isn't
    wanted, in the query's dtype.
    """
    query = inputs["query"]
    assert query is not None
    gradients = []
    for (name, tensor), asked in zip(inputs.items(), wanted, strict=True):
        if tensor is None or not asked:
            gradients.append(query.new_empty(0))
        elif name in ("query", "key", "value") and tensor.dim() == 4:
            gradients.append(empty_outputs(tensor, tensor.shape[3])[0])
        else:
            gradients.append(tensor.new_empty(tensor.shape))
    return tuple(gradients)


def laid_out(out: Tensor, query: Tensor) -> Tensor:
    """`out` with the strides that `empty_outputs` gives it: itself if it has them, or else a copy."""
    _, heads, length, dim = out.shape
    row, head = (heads * dim, dim) if is_transposed(query) else (dim, length * dim)
    if out.dtype == query.dtype and out.stride() == (heads * length * dim, head, row, 1):
        return out
    return empty_outputs(query, dim)[0].copy_(out)


def is_transposed(query: Tensor) -> bool:
    """Whether lengths come before heads in memory; a length that only a run can tell is taken to be more than 1."""
    is_one = is_known(query.shape[1] <= 1) or is_known(query.shape[2] <= 1)
    return not is_one and is_known(query.stride(1) < query.stride(2))


def heads_are_batches(tensor: Tensor) -> bool:
    """Whether the first two dimensions are one, in memory."""
    batch, heads, _, _ = tensor.shape
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)
