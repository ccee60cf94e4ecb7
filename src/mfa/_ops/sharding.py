"""How DTensor may split attention over a mesh without communication: by the batch, or by the heads.

`register()` teaches torch; anything else that a caller has sharded, DTensor gathers first (the sequence too: for that,
see context_parallel.py). Registration waits until torch.distributed.tensor is there, since its import is slow.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from .library import ops

# Where a tensor is split: a dimension, or _SUM: each rank has a term of it, or None: each rank has all of it.
_SUM = -1
_Places = list[int | None]
_Way = tuple[_Places, _Places]  # of the outputs, and of the tensors among the first arguments
# What stands between the slopes and the correction of a backward pass.
_NO_TENSORS: _Places = [None] * 7
_registered = False


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def ready(tensor: Tensor) -> None:
    """Registers the rules if `tensor` is a DTensor. Costs nothing for a plain tensor."""
    if type(tensor) is not Tensor and is_dtensor(tensor):
        register()


def register() -> None:
    """Registers the rules, once."""
    global _registered
    if _registered:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for name, ways in _WAYS.items():
        op = getattr(ops, name).default
        register_sharding(op)(_rule(_torch.count_results(op), ways))
    _registered = True


def _rule(outputs: int, ways: Callable[..., list[_Way]]) -> Callable[..., Sequence[tuple[list[Any], list[Any]]]]:
    """A sharding function of torch: everything on every rank, or one of `ways`."""

    def rule(*args: Any) -> Sequence[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        def placement(where: int | None) -> Any:
            return Replicate() if where is None else Partial() if where == _SUM else Shard(where)

        def of_arguments(places: _Places) -> list[Any]:
            padded = itertools.chain(places, itertools.repeat(None))
            return [placement(where) if _is_tensor(arg) else None for where, arg in zip(padded, args, strict=False)]

        whole: _Way = ([None] * outputs, [])
        return [([placement(where) for where in out], of_arguments(inputs)) for out, inputs in [whole, *ways(*args)]]

    return rule


def _is_tensor(argument: object) -> bool:
    return hasattr(argument, "placements")


def _heads_belong_together(query: Any, key: Any, dimension: int) -> bool:
    """Whether equal parts of query and key heads use each other only, over any dimensions of the mesh."""
    heads, key_heads = query.shape[dimension], key.shape[dimension]
    if heads == key_heads:
        return True
    sizes = query.mesh.shape
    counts = [math.prod(chosen) for n in range(len(sizes) + 1) for chosen in itertools.combinations(sizes, n)]
    return all(key_heads % count == 0 for count in counts if count <= key_heads)


def _key_place(query: Any, key: Any, dimension: int) -> int | None:
    """Where key and value are split when the query's heads are: a single head is for all."""
    return None if key.shape[dimension] == 1 != query.shape[dimension] else dimension


def _last(slopes: Any) -> int | None:
    """The heads of alibi_slopes [Hq] or [B,Hq]."""
    return None if slopes is None else slopes.ndim - 1


def _first(slopes: Any) -> int | None:
    """The batch of alibi_slopes [Hq] or [B,Hq]."""
    return None if slopes is None or slopes.ndim == 1 else 0


def _of_bias(bias: Any, dimension: int) -> int | None:
    return None if bias is None or bias.shape[dimension] == 1 else dimension


def _gradients(places: _Places, output_mask: Sequence[bool]) -> _Places:
    """What every rank has all of, it has a term of the gradient of. An unwanted gradient is empty."""
    return [
        None if not wanted else _SUM if where is None else where
        for where, wanted in zip(places, output_mask, strict=True)
    ]


def _dense(query: Any, key: Any, bias: Any, slopes: Any) -> list[_Places]:
    """Of query, key, value, bias, sinks and alibi_slopes."""
    ways: list[_Places] = [[0, 0, 0, _of_bias(bias, 0), None, _first(slopes)]]
    if _heads_belong_together(query, key, 1):
        keys = _key_place(query, key, 1)
        ways.append([1, keys, keys, _of_bias(bias, 1), 0, _last(slopes)])
    return ways


def _forward(query: Any, key: Any, value: Any, bias: Any, sinks: Any, slopes: Any, *rest: Any) -> list[_Way]:
    # Dropout is keyed on absolute batches and heads.
    return [] if rest[4] != 0 else [([places[0]] * 2, places) for places in _dense(query, key, bias, slopes)]


def _backward(*args: Any) -> list[_Way]:
    query, key, bias, slopes = args[2], args[3], args[7], args[9]
    if args[14] != 0:
        return []
    return [
        (
            _gradients(places, args[16]),
            [places[0], places[0], *places[:3], places[0], places[0], *places[3:], *_NO_TENSORS, places[0]],
        )
        for places in _dense(query, key, bias, slopes)
    ]


def _packed(query: Any, key: Any, slopes: Any) -> list[_Places]:
    """Of query, key, value, four arguments of the layout, sinks and alibi_slopes."""
    if not _heads_belong_together(query, key, 1):
        return []
    keys = _key_place(query, key, 1)
    return [[1, keys, keys, None, None, None, None, 0, _last(slopes)]]


def _varlen_forward(*args: Any) -> list[_Way]:
    return [] if args[13] != 0 else [([1, 0], places) for places in _packed(args[0], args[1], args[8])]


def _varlen_backward(*args: Any) -> list[_Way]:
    if args[17] != 0:
        return []
    return [
        (_gradients([*places[:3], *places[7:]], args[19]), [1, 0, *places[:3], 1, 0, *places[3:], *_NO_TENSORS, 1])
        for places in _packed(args[2], args[3], args[12])
    ]


def _decode(*args: Any) -> list[_Way]:
    query, cache, table, slopes = args[0], args[1], args[4], args[8]
    ways: list[_Way] = []
    if table is None:
        ways.append(([0, 0], [0, 0, 0, 0, None, 0, 0, None, _first(slopes)]))
    if _heads_belong_together(query, cache, 1):
        keys = _key_place(query, cache, 1)
        ways.append(([1, 1], [1, keys, keys, None, None, keys, keys, 0, _last(slopes)]))
    return ways


def _with_correction(forward: Callable[..., list[_Way]]) -> Callable[..., list[_Way]]:
    """The correction is laid out as out, or empty."""

    def ways(*args: Any) -> list[_Way]:
        is_empty = args[0].tensor_meta.dtype.itemsize > 2
        return [([*results, None if is_empty else results[0]], inputs) for results, inputs in forward(*args)]

    return ways


_WAYS: dict[str, Callable[..., list[_Way]]] = {
    "attention_forward": _forward,
    "attention_forward_with_correction": _with_correction(_forward),
    "attention_backward": _backward,
    "attention_varlen_forward": _varlen_forward,
    "attention_varlen_forward_with_correction": _with_correction(_varlen_forward),
    "attention_varlen_backward": _varlen_backward,
    "attention_decode": _decode,
}
