"""What attention over a cache refuses, with the sentences of tensors.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import Append, Decode, Paged
from .indices import check_index_tensor, host_values
from .numbers import as_integer
from .sizes import equal, holds, is_known
from .tensors import check_features, check_heads_and_dims, check_is_tensor, check_tensors, dtype_name

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
PAGE_MULTIPLE = 8


def capacity(arguments: Decode) -> int:
    """How many tokens one batch entry may have."""
    pages = 1 if arguments.block_table is None else arguments.block_table.shape[1]
    return pages * arguments.key_cache.shape[2]


def check_decode(arguments: Decode, *, metal: bool) -> None:
    """Everything about the arguments of `mfa::attention_decode` but cache_lengths and the block table's contents."""
    query, key_cache, value_cache = arguments.query, arguments.key_cache, arguments.value_cache
    check_tensors(query, query, query, ranks=(4,))
    scales = arguments.key_scale, arguments.value_scale
    check_caches(query, (key_cache, value_cache), scales, ("key_cache", "value_cache"))
    batch = query.shape[0]
    if arguments.block_table is not None:
        check_index_tensor("block_table", arguments.block_table, query, "[B,pages per sequence]", (batch, None))
        check_page("key_cache", key_cache, arguments.block_table)
    elif not holds(key_cache.shape[0] == batch):
        raise ValueError(f"key_cache has batch size {key_cache.shape[0]}; it must be that of query, {batch}")
    if arguments.attn_mask is not None:
        _check_mask(arguments.attn_mask, query)
    if arguments.cache_leftpad is not None:
        check_index_tensor("cache_leftpad", arguments.cache_leftpad, query, "[B]", (batch,))
        if arguments.block_table is not None and not is_known(arguments.block_table.shape[1] == 1):
            raise NotImplementedError(
                "cache_leftpad is given, and block_table too; it must be None for a paged cache: leave pages out of "
                "the block table"
            )
    check_features(arguments, ("B", batch), metal=metal)
    as_integer("num_splits", arguments.num_splits)


def check_caches(
    query: Tensor, caches: tuple[Tensor, Tensor], scales: tuple[Tensor | None, Tensor | None], names: tuple[str, str]
) -> None:
    """Keys and values, dense or paged, of full or of 8-bit numbers; the query is [...,Hq,Lq,D]."""
    key, value = caches
    for name, cache in zip(names, caches, strict=True):
        _check_tensor(name, cache, query, 4, (query.dtype, *QUANTIZED_DTYPES))
    _check_sizes(query, key, value, names)
    for side, scale, cache, name in zip(("key", "value"), scales, caches, names, strict=True):
        _check_scales(f"{side}_scale", scale, name, cache, query)


def check_page(name: str, cache: Tensor, block_table: Tensor) -> None:
    """A tile of eight keys lies in one page."""
    page, is_one_page = cache.shape[2], is_known(block_table.shape[1] == 1)
    if not is_one_page and (page < PAGE_MULTIPLE or page % PAGE_MULTIPLE):
        raise ValueError(f"{name} has pages of {page} tokens; it must be a multiple of {PAGE_MULTIPLE}, and not 0")


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


def _check_mask(mask: Tensor, query: Tensor) -> None:
    _check_tensor("attn_mask", mask, query, 4, (torch.bool,))
    for size, (found, full) in enumerate(zip(mask.shape, query.shape[:3], strict=False)):
        if not (holds(found == full) or (size < 2 and holds(found == 1))):
            wanted = f"[B,Hq,Lq,K] = {list(query.shape[:3])} and K, where B and Hq may be 1"
            raise ValueError(f"attn_mask has shape {list(mask.shape)}; it must have shape {wanted}")


def check_batch_idx(cache_batch_idx: Tensor, block_table: Tensor | None, query: Tensor) -> None:
    """Rows of a dense cache, but for their contents."""
    if block_table is not None:
        raise ValueError("cache_batch_idx is given, and block_table too; it must be None for a paged cache")
    check_index_tensor("cache_batch_idx", cache_batch_idx, query, "[B]", tuple(query.shape[:1]))


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str]) -> None:
    dim = query.shape[3]
    if not equal(value.shape[:3], key.shape[:3]):
        shapes = list(value.shape[:3]), list(key.shape[:3])
        raise ValueError(f"{names[1]} has shape {shapes[0]} and Dv; it must begin with that of {names[0]}, {shapes[1]}")
    if not holds(key.shape[3] == dim):
        raise ValueError(f"{names[0]} has head dimension {key.shape[3]}; it must have that of query, {dim}")
    check_heads_and_dims(query, names[0], key, names[1], value)


def _check_scales(name: str, scales: Tensor | None, cache_name: str, cache: Tensor, query: Tensor) -> None:
    dtype = dtype_name(cache.dtype)
    if cache.dtype not in QUANTIZED_DTYPES:
        if scales is not None:
            raise ValueError(f"{name} is given for a {cache_name} of {dtype}; it must be None unless that is quantized")
        return
    if scales is None:
        raise ValueError(f"{name} is None; it must have a scale for each token of the {dtype} {cache_name}")
    _check_tensor(name, scales, query, 3, (torch.float32,))
    if not equal(scales.shape, cache.shape[:3]):
        raise ValueError(
            f"{name} has shape {list(scales.shape)}; it must have the first three sizes of {cache_name}, "
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


def check_lengths(name: str, lengths: Tensor | int, new: int, arguments: Decode, *, of_rows: bool = False) -> None:
    """Tokens in the cache, before `new` ones are appended: int32 [B], or one number for all.

    Contents are checked where the host can see them: the capacity, where live tokens start, that there are as many as
    the mask is over, the pages that they need, and that no two batch entries append to the same place.

    Args:
        of_rows: the block table is cache_batch_idx, and its pages are rows of the cache.
    """
    query, key_cache, block_table = arguments.query, arguments.key_cache, arguments.block_table
    batch, slots = query.shape[0], capacity(arguments)
    if isinstance(lengths, Tensor):
        check_index_tensor(name, lengths, query, "[B]", (batch,))
        values = host_values(lengths)
    else:
        values = [as_integer(name, lengths)] * batch
    if not holds(new <= slots):
        raise ValueError(f"key has length {new}; it must be at most the capacity of the cache, {slots}")
    if is_known(key_cache.shape[0] == 0) and not (is_known(new == 0) or is_known(query.shape[0] == 0)):
        raise ValueError("key_cache has no pages; it must have some to append to")
    for entry, value in enumerate(values or ()):
        if not (holds(value >= 0) and holds(value <= slots - new)):
            after = "" if new == 0 else f" and {new} new"
            raise ValueError(
                f"{name} has {value}{after} tokens at {entry}; they must be within 0 ... {slots}, the cache's capacity"
            )
    _check_live(name, values, new, arguments)
    table = None if block_table is None else host_values(block_table)
    if block_table is None or table is None or values is None:
        return
    check_live_pages(block_table, [value + new for value in values], key_cache, of_rows=of_rows)
    page, width = key_cache.shape[2], block_table.shape[1]
    owners: dict[tuple[int, int], int] = {}
    words = "cache_batch_idx has row" if of_rows else "block_table has page"
    for entry, value in enumerate(values):
        row = table[entry * width : (entry + 1) * width]
        for slot in range(value, value + new):
            place = (row[slot // page], slot % page)
            if owners.setdefault(place, entry) != entry:
                raise ValueError(
                    f"{words} {place[0]} for entries {owners[place]} and {entry}, which append to the "
                    "same slot of it; it must give each one of its own"
                )


def _check_live(name: str, lengths: list[int] | None, new: int, arguments: Decode) -> None:
    pads = None if arguments.cache_leftpad is None else host_values(arguments.cache_leftpad)
    masked = 0 if arguments.attn_mask is None else arguments.attn_mask.shape[3]
    for entry, length in enumerate(lengths or ()):
        pad = 0 if pads is None else pads[entry]
        if not (holds(pad >= 0) and holds(pad <= length)):
            raise ValueError(f"cache_leftpad is {pad} at {entry}; it must be within 0 ... {length}, {name}")
        if not holds(masked <= length + new - pad):
            raise ValueError(
                f"attn_mask is over {masked} tokens; it must be over at most {length + new - pad}, as live at {entry}"
            )


def check_live_pages(block_table: Tensor, lengths: list[int], cache: Tensor, *, of_rows: bool = False) -> None:
    """That the pages which so many tokens of each entry need exist, where the host can see them.

    of_rows: the pages are rows of a dense cache, which cache_batch_idx has.
    """
    table = host_values(block_table)
    (pages, _, page, _), width = cache.shape, block_table.shape[1]
    words = "cache_batch_idx has row" if of_rows else "block_table has page"
    for entry, length in enumerate(lengths if table is not None else ()):
        assert table is not None
        for index, number in enumerate(table[entry * width : entry * width - (-length // max(page, 1))]):
            if not 0 <= number < pages:
                where = entry if of_rows else [entry, index]
                raise ValueError(f"{words} {number} at {where}; it must be within 0 ... {pages - 1}")


def check_no_grad(arguments: Append | Decode | Paged) -> None:
    """Refuses, instead of returning something without a gradient."""
    for name, tensor in arguments._asdict().items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad, and attention over a cache has no gradients: call under torch.no_grad(), or "
                "use mfa.attention"
            )
