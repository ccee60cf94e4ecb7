"""The op of attention over a cache."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .._arguments import Decode
from .._checks.cache import capacity, check_decode, check_lengths
from .._checks.indices import check_index_tensor, host_values
from .._cpu.decode import attention_decode
from .._cpu.layout import empty_outputs
from . import inference
from .library import LIBRARY, ops
from .vmap import Dims, Results, one_by_one


def _check(arguments: Decode, *, metal: bool) -> None:
    check_decode(arguments, metal=metal)
    query = arguments.query
    check_index_tensor("cache_lengths", arguments.cache_lengths, query, "[B]", (query.shape[0],))


def _decode_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    return one_by_one(ops.attention_decode, info.batch_size, in_dims, args)


def _decode_flops(*args: Any, **_: Any) -> int:
    """Of the live keys where the host sees how many there are, and of the whole capacity elsewhere."""
    arguments = Decode(*args)
    batch, heads, length, dim = arguments.query.shape
    lengths = host_values(arguments.cache_lengths)
    keys = batch * capacity(arguments) if lengths is None else sum(lengths)
    return 2 * heads * length * keys * (dim + arguments.value_cache.shape[3])


inference.register(
    "attention_decode",
    Decode,
    check=_check,
    check_contents=lambda arguments: check_lengths("cache_lengths", arguments.cache_lengths, 0, arguments),
    on_cpu=attention_decode,
    empty_outputs=lambda arguments: empty_outputs(arguments.query, arguments.value_cache.shape[3]),
    cast=("query",),
    caches=("key_cache", "value_cache"),
)
inference.refuse_gradients("attention_decode", "attention over a cache has no gradients: use mfa.attention")
torch.library.register_vmap("mfa::attention_decode", _decode_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_decode, get_raw=True)(_decode_flops)
