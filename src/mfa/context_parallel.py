"""Attention over a sequence that is split across processes, of plain tensors or DTensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch.distributed as dist

from ._checks.numbers import as_number, as_window, check_flag
from ._checks.tensors import check_is_tensor
from ._ops import sharding
from ._parallel import ring

if TYPE_CHECKING:
    from torch import Tensor

_Bound = int | None


@overload
def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mfa.attention` over a sequence of which each process has a part; every process of the group calls it.

    Of plain tensors, each process gives its own part, and the parts are in the order of the ranks; they may differ in
    length. Of DTensors, the dimension of the mesh along which the sequence is sharded (Shard(2)) is the ring; batch
    (Shard(0)), heads (Shard(1)) and replicas need no communication, and nothing at all has to be sharded. DTensors
    whose sequence is whole can go to `mfa.attention` just as well.

    Lq and Lk, and with them is_causal and window, mean the whole sequence. Gradients flow to query, key and value, and
    to sinks: of plain tensors, those are the gradient of this process's rows, to be summed over the group, like any
    replicated parameter's. The backward pass is collective too, and computes each part of the forward pass again.

    Args:
        query: [B,Hq,Lq of this process,D]; float16, bfloat16, float32 or, on the CPU, float64.
        key, value: [B,Hkv,Lk of this process,D|Dv], of the same dtype and device; Hq is a multiple of Hkv.
        is_causal: query i sees key j iff j <= i (aligned to the upper left).
        scale: of the scores; None is 1/sqrt(D).
        group: the processes of plain tensors, None = all; a backend that sends and receives the device's tensors.
        window: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap).
        sinks: [Hq], float32 or the query's dtype, the same in each process; a DTensor if query is one.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [B,Hq,Lq of this process,Dv] in the query's dtype; with return_lse also lse [B,Hq,Lq of this process],
        float32. DTensors of the query's placements if that is one.

    Raises:
        ValueError: shapes or values out of range, or that don't agree between processes; no process group; placements
            that differ, or that don't fit the heads.
        TypeError: dtypes that differ or aren't supported; plain tensors together with DTensors.
        NotImplementedError: a sequence that is sharded along two dimensions of the mesh.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        check_flag(name, flag)
    scale = None if scale is None else as_number("scale", scale)
    terms = ring.Terms(is_causal, *as_window(window), scale, as_number("softcap", softcap))
    if sharding.is_dtensor(query):
        if group is not None:
            raise ValueError("group is given with DTensors; it must be None, since their mesh has the groups")
        from ._parallel import dtensor

        out, lse = dtensor.attend(query, key, value, sinks, terms)
    else:
        for name, other in (("key", key), ("value", value), ("sinks", sinks)):
            if sharding.is_dtensor(other):
                raise TypeError(f"{name} is a DTensor, and query is none; all must be of one kind")
        if group is None and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group is None, and torch.distributed is not initialised; it must be, or group be given")
        out, lse = ring.attend(query, key, value, sinks, terms, group)
    return (out, lse) if return_lse else out
