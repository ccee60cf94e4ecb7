"""The op of attention over a cache: its kernel on the CPU, fake, autograd, autocast, vmap and FLOPs, in that order."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._checks.cache import QUANTIZED_DTYPES, capacity, check_decode, check_lengths
from .._checks.indices import check_index_tensor, host_values
from .._checks.tensors import as_runtime_errors
from .._cpu.decode import attention_decode
from .._cpu.layout import empty_outputs
from . import autograd, dense
from .library import LIBRARY, ops

_Dims = tuple[int | None, ...]
_DECODE = "mfa::attention_decode"


@as_runtime_errors
def _decode_cpu_kernel(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    simulation = _simulation.active()
    caches, scales = (key_cache, value_cache), (key_scale, value_scale)
    terms = (sinks, alibi_slopes, scale, window_left, window_right, softcap)
    check_decode(
        *(query, *caches, block_table, *scales, sinks, alibi_slopes, scale, softcap, num_splits),
        metal=simulation is not None,
    )
    check_lengths("cache_lengths", cache_lengths, 0, query, key_cache, block_table)
    arguments = (query, *caches, cache_lengths, block_table, *scales, *terms)
    if simulation is not None:  # what an MPS tensor reaches
        outputs: tuple[Tensor, Tensor] = simulation.call(ops.attention_decode.default, *arguments, num_splits)
        return outputs
    with _torch.below_autograd():
        return attention_decode(*arguments)


@as_runtime_errors
def _decode_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    check_decode(
        *(query, key_cache, value_cache, block_table, key_scale, value_scale, sinks, alibi_slopes),
        *(scale, softcap, num_splits),
        metal=query.device.type == "mps",
    )
    check_index_tensor("cache_lengths", cache_lengths, query, "[B]", (query.shape[0],))
    return empty_outputs(query, value_cache.shape[3])


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pass


def _decode_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention over a cache has no gradients: use mfa.attention")


def _decode_autocast(query: Tensor, key_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    device = query.device.type
    with torch.autocast(device, enabled=False):
        query = autocast(device, query, key_cache)
        outputs: tuple[Tensor, Tensor] = ops.attention_decode(query, key_cache, *rest)
    return outputs


def autocast(device: str, tensor: Tensor, key_cache: Tensor) -> Tensor:
    """What autocast makes of a query, key or value: the cache's dtype, for that isn't cast, or else autocast's own."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    quantized = key_cache.dtype in QUANTIZED_DTYPES
    return tensor.to(torch.get_autocast_dtype(device) if quantized else key_cache.dtype)


def _decode_vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[tuple[Tensor, ...], _Dims]:
    return dense._one_by_one(ops.attention_decode, info.batch_size, in_dims, args)


def _decode_flops(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any, **_: Any) -> int:
    """Of the live keys where the host sees how many there are, and of the whole capacity elsewhere."""
    batch, heads, length, dim = query.shape
    lengths = host_values(rest[0])
    keys = batch * capacity(key_cache, rest[1]) if lengths is None else sum(lengths)
    return 2 * heads * length * keys * (dim + value_cache.shape[3])


LIBRARY.impl("attention_decode", _decode_cpu_kernel, "CPU")
torch.library.register_fake(_DECODE, _decode_fake, lib=LIBRARY)
autograd.register(_DECODE, _decode_backward, setup_context=_decode_setup, lib=LIBRARY)
LIBRARY.impl("attention_decode", _decode_autocast, "AutocastCPU")
LIBRARY.impl("attention_decode", _decode_autocast, "AutocastMPS")
torch.library.register_vmap(_DECODE, _decode_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_decode, get_raw=True)(_decode_flops)
