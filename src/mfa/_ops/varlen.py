"""Ops of packed sequences: for each its kernel on the CPU, fake, autograd, autocast, vmap and FLOPs, in that order."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._checks.indices import host_values
from .._checks.tensors import as_runtime_errors, check_results
from .._checks.varlen import check_forward, check_starts
from .._cpu import composition_varlen
from .._cpu.layout import empty_correction, empty_gradients
from .._cpu.varlen import (
    attention_varlen_backward,
    attention_varlen_forward,
    attention_varlen_forward_with_correction,
    empty_outputs,
)
from . import autograd, dense
from .library import LIBRARY, ops

_Dims = tuple[int | None, ...]
_FORWARD, _BACKWARD = "mfa::attention_varlen_forward", "mfa::attention_varlen_backward"
_CORRECTED = "mfa::attention_varlen_forward_with_correction"


# -- attention_varlen_forward ---------------------------------------------------------------------------------------


def _run(op: Any, on_cpu: Callable[..., Any], *arguments: Any) -> Any:
    """What a forward op returns for CPU tensors; `on_cpu` is its implementation outside of a simulation."""
    simulation = _simulation.active()
    dense.check_arguments(check_forward, arguments, metal=simulation is not None)
    query, key, _value, *layout = arguments[:7]
    check_starts(query, key, *layout)
    if simulation is not None:  # what an MPS tensor reaches
        return simulation.call(op, *arguments)
    with _torch.below_autograd():
        return on_cpu(*arguments[:5], *arguments[7:])  # all but the lengths' maxima


@as_runtime_errors
def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    op = ops.attention_varlen_forward.default
    outputs: tuple[Tensor, Tensor] = _run(op, attention_varlen_forward, *arguments)
    return outputs


@as_runtime_errors
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    terms = (sinks, alibi_slopes, scale, window_left, window_right, softcap)
    arguments = (query, key, value, *layout, *terms, dropout_p, rng_state)
    dense.check_arguments(check_forward, arguments, metal=query.device.type == "mps")
    return empty_outputs(query, value.shape[2])


def _forward_autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    device = query.device.type
    with torch.autocast(device, enabled=False):
        query, key, value, _, sinks = dense.autocast(device, query, key, value, None, rest[4])
        outputs: tuple[Tensor, Tensor] = ops.attention_varlen_forward(query, key, value, *rest[:4], sinks, *rest[5:])
    return outputs


# The mapped dimension becomes part of the heads: it is 1 in packed rows [T,H,X], 0 in [H,T], and last in [H] or [N,H].
_TOKENS, _ROWS, _HEADS = 1, 0, -1


def _fold(size: int, where: int, dim: int | None, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    if where == _HEADS:
        return tensor.movedim(0, -2).flatten(-2)
    return tensor.movedim(0, where).flatten(where, where + 1)


def _folded(size: int, in_dims: _Dims, args: Sequence[Any], places: dict[int, int], starts: int) -> list[Any] | None:
    """The arguments of one call for all; `places`: what is folded, and where. None if that can't be.

    Then the starts differ, or dropout counts heads. `starts`: where cu_seqlens_q is among the arguments.
    """
    if in_dims[starts] is not None or in_dims[starts + 1] is not None or args[starts + 10] > 0:
        return None
    return [
        _fold(size, places[i], dim, arg) if i in places else arg
        for i, (dim, arg) in enumerate(zip(in_dims, args, strict=True))
    ]


def _forward_vmap(op: Any, info: Any, in_dims: _Dims, *args: Any) -> tuple[tuple[Tensor, ...], _Dims]:
    size = info.batch_size
    places = {0: _TOKENS, 1: _TOKENS, 2: _TOKENS, 7: _HEADS, 8: _HEADS}
    folded = _folded(size, in_dims, args, places, starts=3)
    if folded is None:
        return dense._one_by_one(op, size, in_dims, args)
    out, lse, *correction = op(*folded)
    return _unfold([out, lse, *correction], (_TOKENS, _ROWS, _TOKENS), size)


def _unfold(tensors: Sequence[Tensor], places: Sequence[int], size: int) -> tuple[tuple[Tensor, ...], _Dims]:
    """Of results that were folded at `places`; one that isn't wanted has size 0."""
    dims = [0 if tensor.shape == (0,) else place % tensor.dim() for tensor, place in zip(tensors, places, strict=False)]
    return tuple(
        tensor.expand(size, 0) if tensor.shape == (0,) else tensor.unflatten(dim, (size, -1))
        for tensor, dim in zip(tensors, dims, strict=True)
    ), tuple(dims)


def _pairs(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: tuple[int, int]) -> int:
    """How many (query, key) there are: exactly where the host sees the lengths, and at most elsewhere."""
    starts = host_values(cu_seqlens_q), host_values(cu_seqlens_k)
    if starts[0] is not None and starts[1] is not None:
        lengths = [[b - a for a, b in itertools.pairwise(s)] for s in starts if s is not None]
        return sum(q * k for q, k in zip(*lengths, strict=True))
    sequences = cu_seqlens_q.shape[0] - 1
    return min(query.shape[0] * longest[1], key.shape[0] * longest[0], sequences * longest[0] * longest[1])


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
    pairs = _pairs(query, key, rest[0], rest[1], (rest[2], rest[3]))
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


# -- attention_varlen_forward_with_correction: attention_varlen_forward, where something requires grad ---------------


@as_runtime_errors
def _corrected_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = ops.attention_varlen_forward_with_correction.default
    on_cpu = attention_varlen_forward_with_correction
    outputs: tuple[Tensor, Tensor, Tensor] = _run(op, on_cpu, *arguments)
    return outputs


def _corrected_fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _forward_fake(*arguments, **keywords)
    return out, lse, empty_correction(out)


def _corrected_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, *starts, ctx.max_seqlen_q, ctx.max_seqlen_k, sinks, slopes = inputs[:9]
    *ctx.scalars, rng_state = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *dense.saved_results(ctx, output), *starts, sinks, slopes, rng_state)


def _corrected_backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, correction, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, rng_state = ctx.saved_tensors
    layout = (cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k)
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[3])
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 2, 7, 8)]
    grads = ops.attention_varlen_backward(
        grad_out, grad_lse, *tensors, *layout, sinks, alibi_slopes, *ctx.scalars, rng_state, needed, correction
    )
    query, key, value, of_sinks, of_slopes = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return (query, key, value, *(None for _ in layout), of_sinks, of_slopes, *(None for _ in ctx.scalars), None)


# -- attention_varlen_backward --------------------------------------------------------------------------------------


@as_runtime_errors
def _backward_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: Sequence[bool],
    correction: Tensor | None = None,
) -> tuple[Tensor, ...]:
    simulation = _simulation.active()
    starts = (cu_seqlens_q, cu_seqlens_k)
    layout = (*starts, max_seqlen_q, max_seqlen_k)
    terms = (sinks, alibi_slopes, scale, window_left, window_right, softcap)
    forward = (query, key, value, *layout, *terms, dropout_p, rng_state)
    dense.check_arguments(check_forward, forward, metal=simulation is not None)
    tokens, heads = query.shape[:2]
    shapes = (tokens, heads, value.shape[2]), (heads, tokens)
    check_results(grad_out, grad_lse, out, lse, correction, query, *shapes)
    check_starts(query, key, *layout)
    if simulation is not None:  # what an MPS tensor reaches
        results = (grad_out, grad_lse, query, key, value, out, lse)
        arguments = (*results, *layout, *terms, dropout_p, rng_state, output_mask, correction)
        outputs: tuple[Tensor, ...] = simulation.call(ops.attention_varlen_backward.default, *arguments)
        return outputs
    with _torch.below_autograd():
        grads = attention_varlen_backward(
            *(grad_out, grad_lse, query, key, value, out, lse, *starts, *terms, dropout_p, rng_state, output_mask),
            correction,
        )
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: Sequence[bool],
    correction: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return empty_gradients((query, key, value, sinks, alibi_slopes), output_mask)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, starts, (sinks, alibi_slopes) = inputs[:5], inputs[7:9], inputs[11:13]
    *ctx.scalars, rng_state, ctx.mask = inputs[13:20]
    ctx.save_for_backward(*tensors, *starts, sinks, alibi_slopes, rng_state)


def _backward_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """As attention_backward's, sequence by sequence."""
    *tensors, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, rng_state = ctx.saved_tensors
    cotangents = [grad if asked else None for grad, asked in zip(grads, ctx.mask, strict=True)]
    arguments = (*tensors, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, *ctx.scalars, rng_state, cotangents)
    found = composition_varlen.backward_vjp(*arguments)
    needs = [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[11:13]]
    results = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return (*results[:5], *(None,) * 6, *results[5:], *(None for _ in ctx.scalars), None, None, None)


def _backward_vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[tuple[Tensor, ...], _Dims]:
    size = info.batch_size
    places = {0: _TOKENS, 1: _ROWS, **dict.fromkeys((2, 3, 4, 5), _TOKENS), 6: _ROWS, 11: _HEADS, 12: _HEADS}
    if args[20:] not in ((), (None,)):
        places[20] = _TOKENS
    folded = _folded(size, in_dims, args, places, starts=7)
    if folded is None:
        return dense._one_by_one(ops.attention_varlen_backward, size, in_dims, args)
    return _unfold(ops.attention_varlen_backward(*folded), (_TOKENS, _TOKENS, _TOKENS, _HEADS, _HEADS), size)


def _backward_flops(_out: object, _lse: object, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> int:
    pairs = _pairs(query, key, rest[2], rest[3], (rest[4], rest[5]))
    return 2 * query.shape[1] * pairs * (3 * query.shape[2] + 2 * value.shape[2])


# -- registration ---------------------------------------------------------------------------------------------------

LIBRARY.impl("attention_varlen_forward", _forward_cpu, "CPU")
torch.library.register_fake(_FORWARD, _forward_fake, lib=LIBRARY)
autograd.register_through(_FORWARD, _CORRECTED, lib=LIBRARY)
LIBRARY.impl("attention_varlen_forward", _forward_autocast, "AutocastCPU")
LIBRARY.impl("attention_varlen_forward", _forward_autocast, "AutocastMPS")
torch.library.register_vmap(_FORWARD, functools.partial(_forward_vmap, ops.attention_varlen_forward), lib=LIBRARY)
register_flop_formula(ops.attention_varlen_forward, get_raw=True)(_forward_flops)

LIBRARY.impl("attention_varlen_forward_with_correction", _corrected_cpu, "CPU")
torch.library.register_fake(_CORRECTED, _corrected_fake, lib=LIBRARY)
autograd.register(_CORRECTED, _corrected_backward, setup_context=_corrected_setup, lib=LIBRARY)
torch.library.register_vmap(
    _CORRECTED, functools.partial(_forward_vmap, ops.attention_varlen_forward_with_correction), lib=LIBRARY
)
register_flop_formula(ops.attention_varlen_forward_with_correction, get_raw=True)(_forward_flops)

LIBRARY.impl("attention_varlen_backward", _backward_cpu, "CPU")
torch.library.register_fake(_BACKWARD, _backward_fake, lib=LIBRARY)
autograd.register(_BACKWARD, _backward_backward, setup_context=_backward_setup, lib=LIBRARY)
torch.library.register_vmap(_BACKWARD, _backward_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_varlen_backward, get_raw=True)(_backward_flops)
