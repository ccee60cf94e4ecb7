"""The op of attention over a cache: its kernel on the CPU, fake, autograd, autocast, vmap and FLOPs, in that order."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._arguments import Decode
from .._checks.cache import QUANTIZED_DTYPES, capacity, check_decode, check_lengths
from .._checks.indices import check_index_tensor, host_values
from .._checks.tensors import as_runtime_errors
from .._cpu.decode import attention_decode
from .._cpu.layout import empty_outputs
from . import autograd
from .library import LIBRARY, ops
from .vmap import Dims, Results, one_by_one

_DECODE = "mfa::attention_decode"
_Outputs = tuple[Tensor, Tensor]


@as_runtime_errors
def _decode_cpu(*args: Any) -> _Outputs:
    arguments, simulation = Decode(*args), _simulation.active()
    check_decode(arguments, metal=simulation is not None)
    check_lengths("cache_lengths", arguments.cache_lengths, 0, arguments)
    if simulation is not None:  # what an MPS tensor reaches
        outputs: _Outputs = simulation.call(ops.attention_decode.default, *args)
        return outputs
    with _torch.below_autograd():
        return attention_decode(arguments)


@as_runtime_errors
def _decode_fake(*args: Any, **keywords: Any) -> _Outputs:
    arguments = Decode(*args, **keywords)
    query = arguments.query
    check_decode(arguments, metal=query.device.type == "mps")
    check_index_tensor("cache_lengths", arguments.cache_lengths, query, "[B]", (query.shape[0],))
    return empty_outputs(query, arguments.value_cache.shape[3])


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    pass


def _decode_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention over a cache has no gradients: use mfa.attention")


def _decode_autocast(*args: Any) -> _Outputs:
    arguments = Decode(*args)
    device = arguments.query.device.type
    with torch.autocast(device, enabled=False):
        query = autocast(device, arguments.query, arguments.key_cache, arguments.value_cache)
        outputs: _Outputs = ops.attention_decode(*arguments._replace(query=query))
    return outputs


def autocast(device: str, tensor: Tensor, *caches: Tensor) -> Tensor:
    """What autocast makes of a query, key or value: the caches' dtype, for they aren't cast, or else autocast's own."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    dtypes = (cache.dtype for cache in caches if cache.dtype not in QUANTIZED_DTYPES)
    return tensor.to(next(dtypes, None) or torch.get_autocast_dtype(device))


def _decode_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    return one_by_one(ops.attention_decode, info.batch_size, in_dims, args)


def _decode_flops(*args: Any, **_: Any) -> int:
    """Of the live keys where the host sees how many there are, and of the whole capacity elsewhere."""
    arguments = Decode(*args)
    batch, heads, length, dim = arguments.query.shape
    lengths = host_values(arguments.cache_lengths)
    keys = batch * capacity(arguments) if lengths is None else sum(lengths)
    return 2 * heads * length * keys * (dim + arguments.value_cache.shape[3])


LIBRARY.impl("attention_decode", _decode_cpu, "CPU")
torch.library.register_fake(_DECODE, _decode_fake, lib=LIBRARY)
autograd.register(_DECODE, _decode_backward, setup_context=_decode_setup, lib=LIBRARY)
LIBRARY.impl("attention_decode", _decode_autocast, "AutocastCPU")
LIBRARY.impl("attention_decode", _decode_autocast, "AutocastMPS")
torch.library.register_vmap(_DECODE, _decode_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_decode, get_raw=True)(_decode_flops)
