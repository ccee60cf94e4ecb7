"""The op that appends to a cache: its kernel on the CPU, fake, autograd, autocast and vmap, in that order."""

from typing import Any

import torch
from torch import Tensor

from .. import _simulation, _torch
from .._arguments import Append
from .._checks.append import check_append, check_contents
from .._checks.cache import check_no_grad
from .._checks.tensors import as_runtime_errors
from .._cpu.append import attention_append
from .._cpu.layout import empty_outputs
from . import autograd
from .decode import autocast
from .library import LIBRARY, ops
from .vmap import Dims, Results

_APPEND = "mfa::attention_append"
_MUTABLE = ("key_cache", "value_cache", "key_scale", "value_scale")
_Outputs = tuple[Tensor, Tensor]


@as_runtime_errors
def _append_cpu(*args: Any) -> _Outputs:
    arguments, simulation = Append(*args), _simulation.active()
    check_append(arguments, metal=simulation is not None)
    check_contents(arguments)
    if simulation is not None:  # what an MPS tensor reaches
        outputs: _Outputs = simulation.call(ops.attention_append.default, *args)
        return outputs
    with _torch.below_autograd():
        return attention_append(arguments)


@as_runtime_errors
def _append_fake(*args: Any, **keywords: Any) -> _Outputs:
    arguments = Append(*args, **keywords)
    query = arguments.query
    check_append(arguments, metal=query.device.type == "mps")
    rotated = query.new_empty(0) if arguments.rotary_cos is None else empty_outputs(query, query.shape[3])[0]
    return rotated, query.new_empty(query.shape[0], dtype=torch.int32)


def _append_autograd(keyset: Any, *args: Any) -> _Outputs:
    arguments = Append(*args)
    autograd.refuse_tangents(_APPEND, args)
    if torch.is_grad_enabled():
        check_no_grad(arguments)
    for name in _MUTABLE:  # as an in-place operation does it
        if (tensor := getattr(arguments, name)) is not None:
            torch.autograd.graph.increment_version(tensor)
    outputs: _Outputs = autograd.redispatch(ops.attention_append.default, keyset, args)
    return outputs


def _append_autocast(*args: Any) -> _Outputs:
    arguments = Append(*args)
    device = arguments.query.device.type
    with torch.autocast(device, enabled=False):
        caches = arguments.key_cache, arguments.value_cache
        query, key, value = (autocast(device, x, *caches) for x in (arguments.query, arguments.key, arguments.value))
        outputs: _Outputs = ops.attention_append(*arguments._replace(query=query, key=key, value=value))
    return outputs


def _append_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    raise NotImplementedError(
        "key and value can't be appended to a cache inside torch.vmap: make the mapped dimension part of the batch"
    )


LIBRARY.impl("attention_append", _append_cpu, "CPU")
torch.library.register_fake(_APPEND, _append_fake, lib=LIBRARY)
LIBRARY.impl("attention_append", _append_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("attention_append", _append_autocast, "AutocastCPU")
LIBRARY.impl("attention_append", _append_autocast, "AutocastMPS")
torch.library.register_vmap(_APPEND, _append_vmap, lib=LIBRARY)
