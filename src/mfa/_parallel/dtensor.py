"""Attention of DTensors: the dimension of the mesh along which the sequence is sharded becomes the ring."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .._checks.dense import check_forward
from .._checks.tensors import widened
from .._ops import ops
from . import ring

_BATCH, _HEADS, _SEQUENCE = 0, 1, 2


def attend(query: Any, key: Any, value: Any, sinks: Any, terms: ring.Terms) -> tuple[Tensor, Tensor]:
    """Out and lse, with the query's placements; see `context_parallel`. All are DTensors, or are refused."""
    sinks = widened(sinks, query)
    for name, tensor in (("key", key), ("value", value), ("sinks", sinks)):
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} is a tensor, and query is a DTensor; all must be of one kind")
        if tensor.device_mesh != query.device_mesh:
            raise ValueError(f"{name} is on another mesh; it must be on that of query")
    check_forward(terms.of(query, key, value, sinks), metal=False)
    mesh, placements = query.device_mesh, query.placements
    for name, tensor in (("key", key), ("value", value)):
        if tensor.placements != placements:
            raise ValueError(
                f"{name} has placements {tensor.placements}; it must have those of query, {placements}: redistribute it"
            )
    sharded = _sharded(placements)
    if sharded.count(_SEQUENCE) > 1:
        raise NotImplementedError(
            f"query has placements {placements}; its sequence can be sharded along one dimension of the mesh only"
        )
    head_processes = math.prod(size for size, where in zip(mesh.shape, sharded, strict=True) if where == _HEADS)
    if query.shape[1] != key.shape[1] and key.shape[1] % head_processes:
        raise ValueError(
            f"key has {key.shape[1]} heads on {head_processes} processes; it must have a multiple of that, or those of "
            "query"
        )

    tensors = (query.to_local(), key.to_local(), value.to_local())
    own_sinks = None if sinks is None else _local_sinks(sinks, sharded)
    if _SEQUENCE in sharded:
        out, lse = ring.attend(*tensors, own_sinks, terms, mesh.get_group(sharded.index(_SEQUENCE)))
    else:
        out, lse = _alone(*tensors, own_sinks, terms)
    sizes = (*query.shape[:3], value.shape[3])
    return _whole(out, query, sizes), _whole(lse, query, sizes[:3])


def _sharded(placements: tuple[Any, ...]) -> list[int | None]:
    """For each dimension of the mesh, the dimension of the query that is sharded along it."""
    for placement in placements:
        if type(placement) not in (Shard, Replicate) or placement.is_shard(3):
            raise ValueError(
                f"query has placements {placements}; each must be Shard(0), Shard(1), Shard(2) or Replicate(): "
                "redistribute it"
            )
    return [placement.dim if isinstance(placement, Shard) else None for placement in placements]


def _local_sinks(sinks: DTensor, sharded: list[int | None]) -> Tensor:
    """This process's heads; each process has a term of their gradient, or, of a replica, all of it."""
    own = [Shard(0) if where == _HEADS else Replicate() for where in sharded]
    grads = [Partial() if where in (_BATCH, _SEQUENCE) else place for where, place in zip(sharded, own, strict=True)]
    local: Tensor = sinks.redistribute(placements=own).to_local(grad_placements=grads)
    return local


def _alone(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, terms: ring.Terms) -> tuple[Tensor, Tensor]:
    right = terms.window_right
    if terms.is_causal:
        diagonal = query.shape[2] - key.shape[2]
        right = diagonal if right is None else min(right, diagonal)
    arguments = terms.of(query, key, value, sinks)._replace(window_right=right)
    outputs: tuple[Tensor, Tensor] = ops.attention_forward(*arguments)
    return outputs


def _whole(local: Tensor, query: DTensor, sizes: tuple[int, ...]) -> DTensor:
    """A DTensor of this global shape, placed as the query, and dense in memory like `local`."""
    strides = [0] * len(sizes)
    stride = 1
    for dim in sorted(range(len(sizes)), key=lambda d: (local.stride(d), -d)):
        strides[dim] = stride
        stride *= sizes[dim]
    return DTensor.from_local(
        local, query.device_mesh, query.placements, run_check=False, shape=torch.Size(sizes), stride=tuple(strides)
    )
