"""What attention over a cache refuses, with the sentences of tensors.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import Decode
from .indices import check_index_tensor, host_values
from .numbers import as_integer
from .sizes import equal, holds, is_known
from .tensors import check_features, check_heads_and_dims, check_is_tensor, check_tensors, dtype_name

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
PAGE_MULTIPLE = 8


def capacity(arguments: Decode) -> int:
    """How many tokens one batch entry may have."""
    pages = 1 if arguments.block_table is None else arguments.block_table.shape[1]
    return pages * arguments.key_cache.shape[2]


def check_decode(arguments: Decode, *, metal: bool) -> None:
    """Everything about the arguments of `mfa::attention_decode` but cache_lengths and the block table's contents."""
    query, key_cache, value_cache = arguments.query, arguments.key_cache, arguments.value_cache
    check_tensors(query, query, query, ranks=(4,))
    for name, cache, dtypes in (
        ("key_cache", key_cache, (query.dtype, *QUANTIZED_DTYPES)),
        ("value_cache", value_cache, (key_cache.dtype,)),
    ):
        _check_tensor(name, cache, query, 4, dtypes)
    _check_sizes(query, key_cache, value_cache)
    batch = query.shape[0]
    if arguments.block_table is not None:
        check_index_tensor("block_table", arguments.block_table, query, "[B,pages per sequence]", (batch, None))
        page = key_cache.shape[2]
        if page < PAGE_MULTIPLE or page % PAGE_MULTIPLE:
            raise ValueError(
                f"key_cache has pages of {page} tokens; it must be a multiple of {PAGE_MULTIPLE}, and not 0"
            )
    elif not holds(key_cache.shape[0] == batch):
        raise ValueError(f"key_cache has batch size {key_cache.shape[0]}; it must be that of query, {batch}")
    _check_scales("key", arguments.key_scale, key_cache, query)
    _check_scales("value", arguments.value_scale, value_cache, query)
    check_features(arguments, ("B", batch), metal=metal)
    as_integer("num_splits", arguments.num_splits)


def _check_tensor(name: str, tensor: Tensor, query: Tensor, rank: int, dtypes: Sequence[torch.dtype]) -> None:
    check_is_tensor(name, tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        raise NotImplementedError(f"{name} isn't strided; only strided tensors are supported: pad it")
    if tensor.dim() != rank:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have {rank}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on the device of query, {query.device}")
    if tensor.dtype not in dtypes:
        names = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be {names}")


def _check_sizes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    dim = query.shape[3]
    if not equal(value_cache.shape[:3], key_cache.shape[:3]):
        shapes = list(value_cache.shape[:3]), list(key_cache.shape[:3])
        raise ValueError(f"value_cache has shape {shapes[0]} and Dv; it must begin with that of key_cache, {shapes[1]}")
    if not holds(key_cache.shape[3] == dim):
        raise ValueError(f"key_cache has head dimension {key_cache.shape[3]}; it must have that of query, {dim}")
    check_heads_and_dims(query, "key_cache", key_cache, "value_cache", value_cache)


def _check_scales(side: str, scales: Tensor | None, cache: Tensor, query: Tensor) -> None:
    name = f"{side}_scale"
    if cache.dtype not in QUANTIZED_DTYPES:
        if scales is not None:
            dtype = dtype_name(cache.dtype)
            raise ValueError(f"{name} is given for a {side}_cache of {dtype}; it must be None unless that is quantized")
        return
    if scales is None:
        dtype = dtype_name(cache.dtype)
        raise ValueError(f"{name} is None; it must have a scale for each token of the {dtype} {side}_cache")
    _check_tensor(name, scales, query, 3, (torch.float32,))
    if not equal(scales.shape, cache.shape[:3]):
        raise ValueError(
            f"{name} has shape {list(scales.shape)}; it must have the first three sizes of {side}_cache, "
            f"{list(cache.shape[:3])}"
        )


def check_new_tokens(arguments: Decode, key: Tensor, value: Tensor) -> None:
    """Keys and values that are to be appended: [B,Hkv,Lnew,D] and [B,Hkv,Lnew,Dv], in the query's dtype."""
    query, key_cache, value_cache = arguments.query, arguments.key_cache, arguments.value_cache
    for name, tensor in (("key", key), ("value", value)):
        _check_tensor(name, tensor, query, 4, (query.dtype,))
    for name, tensor, dim in (("key", key, key_cache.shape[3]), ("value", value, value_cache.shape[3])):
        shape = (query.shape[0], key_cache.shape[1], key.shape[2], dim)
        if not equal(tensor.shape, shape):
            sizes = f"[B,Hkv,Lnew,D] = {list(shape)}"
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have shape {sizes}")


def check_lengths(name: str, lengths: Tensor | int, new: int, arguments: Decode) -> None:
    """Tokens in the cache, before `new` ones are appended: int32 [B], or one number for all.

    Contents are checked where the host can see them: the capacity, the pages that live tokens need, and that no two
    batch entries append to the same place.
    """
    query, key_cache, block_table = arguments.query, arguments.key_cache, arguments.block_table
    batch, slots = query.shape[0], capacity(arguments)
    if isinstance(lengths, Tensor):
        check_index_tensor(name, lengths, query, "[B]", (batch,))
        values = host_values(lengths)
    else:
        values = [as_integer(name, lengths)] * batch
    after = "" if new == 0 else f" and {new} new"
    if not holds(new <= slots):
        raise ValueError(f"key has length {new}; it must be at most the capacity of the cache, {slots}")
    if is_known(key_cache.shape[0] == 0) and not (is_known(new == 0) or is_known(query.shape[0] == 0)):
        raise ValueError("key_cache has no pages; it must have some to append to")
    for entry, value in enumerate(values or ()):
        if not (holds(value >= 0) and holds(value <= slots - new)):
            raise ValueError(
                f"{name} has {value}{after} tokens at {entry}; they must be within 0 ... {slots}, the cache's capacity"
            )
    table = None if block_table is None else host_values(block_table)
    if block_table is None or table is None or values is None:
        return
    pages, page, width = key_cache.shape[0], key_cache.shape[2], block_table.shape[1]
    owners: dict[tuple[int, int], int] = {}
    for entry, value in enumerate(values):
        row = table[entry * width : (entry + 1) * width]
        for index, number in enumerate(row[: (value + new + page - 1) // page]):
            if not 0 <= number < pages:
                raise ValueError(
                    f"block_table has page {number} at [{entry}, {index}]; it must be within 0 ... {pages - 1}"
                )
        for slot in range(value, value + new):
            place = (row[slot // page], slot % page)
            if owners.setdefault(place, entry) != entry:
                raise ValueError(
                    f"block_table has page {place[0]} for entries {owners[place]} and {entry}, which append to the "
                    "same slot of it; it must give each a page of its own"
                )


def check_no_grad(arguments: Decode, key: Tensor | None, value: Tensor | None) -> None:
    """Refuses, instead of returning something without a gradient."""
    names = ("query", "key_cache", "value_cache", "sinks", "alibi_slopes")
    tensors = {name: getattr(arguments, name) for name in names} | {"key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad, and attention over a cache has no gradients: call under torch.no_grad(), or "
                "use mfa.attention"
            )
