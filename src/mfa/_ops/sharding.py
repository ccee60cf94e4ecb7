"""How DTensor may split attention over a mesh without communication: by the batch, or by the heads.

`register()` teaches torch; anything else that a caller has sharded, DTensor gathers first (the sequence too: for that,
see context_parallel.py). Registration waits until torch.distributed.tensor is there, since its import is slow.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _torch
from .._arguments import DENSE_GRADIENTS, VARLEN_GRADIENTS, Decode, Dense, Paged, Varlen, split
from .library import ops

# Where a tensor is split: a dimension, or _SUM: each rank has a term of it, or None: each rank has all of it.
_SUM = -1
_Places = dict[str, int | None]  # by the names of arguments; None where one is missing
_Way = tuple[list[int | None], _Places]  # of the outputs, and of the tensors among the arguments
_Ways = dict[str, Callable[..., list[_Way]]]
_registered = False


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def ready(tensor: Tensor) -> None:
    """Registers the rules if `tensor` is a DTensor. Costs nothing for a plain tensor."""
    if type(tensor) is not Tensor and is_dtensor(tensor):
        register()


def beside(query: Tensor, tensor: Tensor) -> Tensor:
    """A plain tensor, which every process has alike, as the ops take it beside a query that is a DTensor."""
    if type(query) is Tensor or type(tensor) is not Tensor or not is_dtensor(query):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = query.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def register() -> None:
    """Registers the rules, once."""
    global _registered
    if _registered:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for name, ways in _WAYS.items():
        op = getattr(ops, name).default
        register_sharding(op)(_rule(*_torch.signature(op), ways))
    _registered = True


def _rule(
    names: tuple[str, ...], results: tuple[str, ...], ways: Callable[..., list[_Way]]
) -> Callable[..., Sequence[tuple[list[Any], list[Any]]]]:
    """A sharding function of torch: everything on every rank, or one of `ways`."""

    def rule(*args: Any) -> Sequence[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        def placement(where: int | None) -> Any:
            return Replicate() if where is None else Partial() if where == _SUM else Shard(where)

        def of_arguments(places: _Places) -> list[Any]:
            return [
                placement(places.get(name)) if _is_tensor(arg) else None for name, arg in zip(names, args, strict=False)
            ]

        whole: _Way = ([None] * len(results), {})
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


def _dense(arguments: Dense) -> list[_Places]:
    # Dropout is keyed on absolute batches and heads, and so may a block mask be.
    if arguments.dropout_p != 0 or arguments.block_mask is not None:
        return []
    query, key, bias, slopes = arguments.query, arguments.key, arguments.bias, arguments.alibi_slopes
    by_batch = {"query": 0, "key": 0, "value": 0, "bias": _of_bias(bias, 0), "alibi_slopes": _first(slopes)}
    if not _heads_belong_together(query, key, 1):
        return [by_batch]
    keys = _key_place(query, key, 1)
    rows = {"query": 1, "key": keys, "value": keys}
    return [by_batch, {**rows, "bias": _of_bias(bias, 1), "sinks": 0, "alibi_slopes": _last(slopes)}]


def _varlen(arguments: Varlen) -> list[_Places]:
    query, key = arguments.query, arguments.key
    if arguments.dropout_p != 0 or not _heads_belong_together(query, key, 1):
        return []
    keys = _key_place(query, key, 1)
    return [{"query": 1, "key": keys, "value": keys, "sinks": 0, "alibi_slopes": _last(arguments.alibi_slopes)}]


def _decode(arguments: Decode) -> list[_Places]:
    query, cache, slopes = arguments.query, arguments.key_cache, arguments.alibi_slopes
    tensors = ("query", "key_cache", "value_cache", "cache_lengths", "key_scale", "value_scale")
    ways: list[_Places] = []
    if arguments.block_table is None:
        ways.append({**dict.fromkeys(tensors, 0), "alibi_slopes": _first(slopes)})
    if _heads_belong_together(query, cache, 1):
        keys = _key_place(query, cache, 1)
        caches = dict.fromkeys(("key_cache", "value_cache", "key_scale", "value_scale"), keys)
        ways.append({"query": 1, **caches, "sinks": 0, "alibi_slopes": _last(slopes)})
    return ways


def _paged(arguments: Paged) -> list[_Places]:
    query, key = arguments.query, arguments.key
    if not _heads_belong_together(query, key, 1):
        return []
    pages = dict.fromkeys(("key", "value", "key_scale", "value_scale"), _key_place(query, key, 1))
    return [{"query": 1, **pages, "sinks": 0, "alibi_slopes": _last(arguments.alibi_slopes)}]


def _lse(of_query: int | None, packed: bool) -> int | None:
    """Where lse is split: it is [B,Hq,Lq], or [Hq,Tq] if packed."""
    return 0 if packed and of_query is not None else of_query


def _forward(places: Callable[[Any], list[_Places]], kind: type[Any], *args: Any) -> list[_Way]:
    found = places(kind(*args))
    return [([way["query"], _lse(way["query"], kind in (Varlen, Paged))], way) for way in found]


def _forward_with_correction(places: Callable[[Any], list[_Places]], kind: type[Any], *args: Any) -> list[_Way]:
    """The correction is laid out as out, or empty."""
    arguments = args[: len(kind._fields)]
    is_empty = kind(*arguments).query.tensor_meta.dtype.itemsize > 2
    return [([out, lse, None if is_empty else out], way) for (out, lse), way in _forward(places, kind, *arguments)]


def _backward(
    places: Callable[[Any], list[_Places]], kind: type[Any], gradients: tuple[str, ...], *args: Any
) -> list[_Way]:
    arguments, given = split(kind, args)
    ways: list[_Way] = []
    for way in places(arguments):
        rows, lse = way["query"], _lse(way["query"], kind is Varlen)
        results = {"grad_out": rows, "grad_lse": lse, "out": rows, "lse": lse, "correction": rows}
        # What every rank has all of, it has a term of the gradient of. An unwanted gradient is empty.
        grads = {name: _SUM if way.get(name) is None else way[name] for name in gradients}
        wanted = zip(gradients, given.output_mask, strict=True)
        ways.append(([grads[name] if asked else None for name, asked in wanted], {**way, **results}))
    return ways


def _ways(kind: type[Any], name: str, places: Callable[[Any], list[_Places]], gradients: tuple[str, ...]) -> _Ways:
    """Of a family's ops."""
    return {
        f"{name}_forward": functools.partial(_forward, places, kind),
        f"{name}_forward_with_correction": functools.partial(_forward_with_correction, places, kind),
        f"{name}_backward": functools.partial(_backward, places, kind, gradients),
    }


_WAYS: _Ways = {
    **_ways(Dense, "attention", _dense, DENSE_GRADIENTS),
    **_ways(Varlen, "attention_varlen", _varlen, VARLEN_GRADIENTS),
    "attention_decode": functools.partial(_forward, _decode, Decode),
    "attention_varlen_paged": functools.partial(_forward, _paged, Paged),
}
