"""The op of packed attention over pages: kernel on the CPU, fake, autograd, autocast, vmap, FLOPs, in that order."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._arguments import Paged
from .._checks.indices import host_values
from .._checks.paged import capacity, check_paged, check_paged_contents
from .._checks.tensors import as_runtime_errors
from .._cpu.paged import attention_varlen_paged
from .._cpu.varlen import empty_outputs
from . import autograd
from .decode import autocast
from .library import LIBRARY, ops
from .vmap import Dims, Results, one_by_one

_PAGED = "mfa::attention_varlen_paged"
_Outputs = tuple[Tensor, Tensor]


@as_runtime_errors
def _paged_cpu(*args: Any) -> _Outputs:
    arguments, simulation = Paged(*args), _simulation.active()
    check_paged(arguments, metal=simulation is not None)
    check_paged_contents(arguments)
    if simulation is not None:  # what an MPS tensor reaches
        outputs: _Outputs = simulation.call(ops.attention_varlen_paged.default, *args)
        return outputs
    with _torch.below_autograd():
        return attention_varlen_paged(arguments)


@as_runtime_errors
def _paged_fake(*args: Any, **keywords: Any) -> _Outputs:
    arguments = Paged(*args, **keywords)
    check_paged(arguments, metal=arguments.query.device.type == "mps")
    return empty_outputs(arguments.query, arguments.value.shape[3])


def _paged_setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    pass


def _paged_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("attention over pages has no gradients: use mfa.attention_varlen without block_table")


def _paged_autocast(*args: Any) -> _Outputs:
    arguments = Paged(*args)
    device = arguments.query.device.type
    with torch.autocast(device, enabled=False):
        query = autocast(device, arguments.query, arguments.key)
        outputs: _Outputs = ops.attention_varlen_paged(*arguments._replace(query=query))
    return outputs


def _paged_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    return one_by_one(ops.attention_varlen_paged, info.batch_size, in_dims, args)


def _paged_flops(*args: Any, **_: Any) -> int:
    """Exactly where the host sees the lengths, and at most elsewhere."""
    arguments = Paged(*args)
    tokens, heads, dim = arguments.query.shape
    starts, lengths = host_values(arguments.cu_seqlens_q), host_values(arguments.seqused_k)
    if starts is None or lengths is None:
        pairs = tokens * min(arguments.max_seqlen_k, capacity(arguments))
    else:
        pairs = sum((b - a) * keys for (a, b), keys in zip(itertools.pairwise(starts), lengths, strict=True))
    return 2 * heads * pairs * (dim + arguments.value.shape[3])


LIBRARY.impl("attention_varlen_paged", _paged_cpu, "CPU")
torch.library.register_fake(_PAGED, _paged_fake, lib=LIBRARY)
autograd.register(_PAGED, _paged_backward, setup_context=_paged_setup, lib=LIBRARY)
LIBRARY.impl("attention_varlen_paged", _paged_autocast, "AutocastCPU")
LIBRARY.impl("attention_varlen_paged", _paged_autocast, "AutocastMPS")
torch.library.register_vmap(_PAGED, _paged_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_varlen_paged, get_raw=True)(_paged_flops)
