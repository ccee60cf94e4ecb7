"""Ops of attention: for each its kernel on the CPU, fake, autograd, autocast, vmap and FLOPs, in that order."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._checks.dense import check_forward
from .._checks.tensors import as_runtime_errors, check_has_state, check_results
from .._cpu import composition, dropout
from .._cpu.backward import attention_backward
from .._cpu.forward import attention_forward, attention_forward_with_correction
from .._cpu.layout import empty_correction, empty_gradients, empty_outputs, laid_out
from . import autograd
from .library import LIBRARY, ops

_Dims = tuple[int | None, ...]
_Shape = Sequence[int]
_FORWARD, _BACKWARD = "mfa::attention_forward", "mfa::attention_backward"
_CORRECTED = "mfa::attention_forward_with_correction"


# -- attention_forward ----------------------------------------------------------------------------------------------


def check_arguments(check: Callable[..., None], arguments: Sequence[Any], *, metal: bool) -> None:
    """Those of a forward op, in its order; `check` is its kind's check_forward, which doesn't need the window."""
    *terms, _left, _right, softcap, dropout_p, rng_state = arguments
    check(*terms, softcap, dropout_p, rng_state, metal=metal)
    check_has_state(dropout_p, rng_state)


def _run(op: Any, on_cpu: Callable[..., Any], *arguments: Any) -> Any:
    """What a forward op returns for CPU tensors; `on_cpu` is its implementation outside of a simulation."""
    simulation = _simulation.active()
    check_arguments(check_forward, arguments, metal=simulation is not None)
    if simulation is not None:  # what an MPS tensor reaches
        return simulation.call(op, *arguments)
    with _torch.below_autograd():
        return on_cpu(*arguments)


@as_runtime_errors
def _forward_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = _run(ops.attention_forward.default, attention_forward, *arguments)
    return outputs


@as_runtime_errors
def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value, bias, sinks, alibi_slopes)
    arguments = (*tensors, scale, window_left, window_right, softcap, dropout_p, rng_state)
    check_arguments(check_forward, arguments, metal=query.device.type == "mps")
    return empty_outputs(query, value.shape[3])


def nothing_listens(*tensors: Tensor | None) -> bool:
    """Whether the op would only call the CPU's kernel, so that the way through the dispatcher can be saved.

    That way is most of what a short call costs. Who listens: autograd, torch.func, torch.compile, a mode (FLOP counter,
    fake tensors, tracing), a subclass of Tensor, autocast (which the op turns off), and the simulator.
    """
    if torch.compiler.is_compiling() or _simulation.active() is not None or torch.is_autocast_enabled("cpu"):
        return False
    if _torch.count_dispatch_modes() or _torch.count_function_modes() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if _torch.in_torch_func() or _torch.has_dual_level():
        return False
    if torch.is_grad_enabled() and autograd.requires_grad(*tensors):
        return False
    return all(tensor is None or type(tensor) is Tensor for tensor in tensors)


def _forward_autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    bias, sinks, *others = rest
    device = query.device.type
    with torch.autocast(device, enabled=False):
        tensors = autocast(device, query, key, value, bias, sinks)
        outputs: tuple[Tensor, Tensor] = ops.attention_forward(*tensors, *others)
    return outputs


def autocast(
    device: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What autocast makes of the arguments: its dtype, except for float64, and float32 where an op takes that too."""
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None, kept: tuple[torch.dtype, ...]) -> Any:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype not in kept
        return tensor.to(dtype) if eligible and tensor is not None else tensor

    wide = (torch.float32, torch.float64)
    return (*(cast(tensor, wide[1:]) for tensor in (query, key, value)), cast(bias, wide), cast(sinks, wide))


def _forward_vmap(op: Any, info: Any, in_dims: _Dims, *args: Any) -> tuple[tuple[Tensor, ...], _Dims]:
    if in_dims[4] is not None or args[10] > 0:  # sinks are per head, not per batch; dropout counts batches
        return _one_by_one(op, info.batch_size, in_dims, args)
    tensors = _fold(info.batch_size, in_dims[:6], args[:6], query=0)
    return _unfold(op(*tensors, *args[6:]), info.batch_size)


def _forward_flops(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (dim + value[3])


# -- attention_forward_with_correction: attention_forward, where something requires grad -----------------------------


@as_runtime_errors
def _corrected_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    op = ops.attention_forward_with_correction.default
    outputs: tuple[Tensor, Tensor, Tensor] = _run(op, attention_forward_with_correction, *arguments)
    return outputs


def _corrected_fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _forward_fake(*arguments, **keywords)
    return out, lse, empty_correction(out)


def _corrected_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bias, sinks, alibi_slopes, *ctx.scalars, rng_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *saved_results(ctx, output), bias, sinks, alibi_slopes, rng_state)


def saved_results(ctx: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    out, lse, correction = output
    ctx.mark_non_differentiable(correction)
    return out, lse, correction if out.dtype.itemsize == 2 else None


def _corrected_backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, correction, bias, sinks, alibi_slopes, rng_state = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    tensors = (query, key, value, out, lse, bias, sinks, alibi_slopes)
    needed = list(ctx.needs_input_grad[:6])
    grads = ops.attention_backward(grad_out, grad_lse, *tensors, *ctx.scalars, rng_state, needed, correction)
    grads = [grad if needs else None for grad, needs in zip(grads, needed, strict=True)]
    return (*grads, *(None for _ in ctx.scalars), None)


# -- attention_backward ---------------------------------------------------------------------------------------------


@as_runtime_errors
def _backward_cpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
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
    tensors = (query, key, value, bias, sinks, alibi_slopes)
    window = (window_left, window_right)
    forward = (*tensors, scale, *window, softcap, dropout_p, rng_state)
    check_arguments(check_forward, forward, metal=simulation is not None)
    rows = query.shape[:3]
    check_results(grad_out, grad_lse, out, lse, correction, query, (*rows, value.shape[3]), rows)
    terms = (bias, sinks, alibi_slopes, scale, *window, softcap, dropout_p, rng_state)
    arguments = (grad_out, grad_lse, query, key, value, out, lse, *terms, output_mask, correction)
    if simulation is not None:  # what an MPS tensor reaches
        outputs: tuple[Tensor, ...] = simulation.call(ops.attention_backward.default, *arguments)
        return outputs
    with _torch.below_autograd():
        grads = attention_backward(*arguments)
        of_rows = zip(grads[:3], (query, key, value), strict=True)
        first = [None if grad is None else laid_out(grad, tensor) for grad, tensor in of_rows]
    return tuple(query.new_empty(0) if grad is None else grad for grad in (*first, *grads[3:]))


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
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
    return empty_gradients((query, key, value, bias, sinks, alibi_slopes), output_mask)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (_out, _lse, bias, sinks, alibi_slopes) = inputs[:5], inputs[5:10]
    *ctx.scalars, rng_state, ctx.mask = inputs[10:17]
    ctx.save_for_backward(*tensors, bias, sinks, alibi_slopes, rng_state)


def _backward_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The results are functions of all arguments but out, lse and correction, which are results of the others."""
    grad_out, grad_lse, *inputs, rng_state = ctx.saved_tensors
    *scalars, dropout_p = ctx.scalars
    factors = dropout.all_factors(rng_state, dropout_p, inputs[0], inputs[1].shape[2])
    wanted = zip(grads, inputs, ctx.mask, strict=True)
    cotangents = [grad if asked and composition.is_floating(tensor) else None for grad, tensor, asked in wanted]
    found = composition.backward_vjp(grad_out, grad_lse, inputs, tuple(scalars), factors, cotangents)
    needed = zip(found, [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[7:10]], strict=True)
    results = [grad if needs else None for grad, needs in needed]
    return (*results[:5], None, None, *results[5:], *(None for _ in ctx.scalars), None, None, None)


def _backward_vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[tuple[Tensor, ...], _Dims]:
    # What is summed over the batch, and sinks, are not per batch; dropout counts batches as the forward pass did.
    if any(args[16][3:]) or in_dims[8] is not None or args[14] > 0:
        return _one_by_one(ops.attention_backward, info.batch_size, in_dims, args)
    mapped = (*in_dims[:10], *in_dims[17:]), (*args[:10], *args[17:])  # the last one may not have been given
    tensors = _fold(info.batch_size, *mapped, query=2)
    return _unfold(ops.attention_backward(*tensors[:10], *args[10:17], *tensors[10:]), info.batch_size)


def _backward_flops(_out: object, _lse: object, query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[2] * (3 * dim + 2 * value[3])


# -- vmap: the mapped dimension becomes part of the batch -----------------------------------------------------------


def _fold(size: int, in_dims: _Dims, args: Sequence[Any], query: int) -> list[Any]:
    """The tensors with their mapped dimension in front of the batch, and merged with it; `query` is an index."""
    batch = args[query].movedim(in_dims[query], 0).shape[1] if in_dims[query] is not None else args[query].shape[0]
    return [_fold_one(size, batch, dim, tensor) for dim, tensor in zip(in_dims, args, strict=True)]


def _fold_one(size: int, batch: int, dim: int | None, tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    if dim is None:
        if tensor.dim() == 1 or (tensor.shape[0] == 1 and tensor.dim() == 4 and batch != 1):
            return tensor  # slopes, or a bias, for all batches alike
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
        if tensor.dim() == 2:  # slopes [Hq]
            tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _unfold(tensors: Sequence[Tensor], size: int) -> tuple[tuple[Tensor, ...], _Dims]:
    return tuple(
        tensor.expand(size, 0) if tensor.shape == (0,) else tensor.unflatten(0, (size, -1)) for tensor in tensors
    ), (0,) * len(tensors)


def _one_by_one(op: Any, size: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[tuple[Tensor, ...], _Dims]:
    results = [
        op(*(arg.select(dim, index) if isinstance(dim, int) else arg for dim, arg in zip(in_dims, args, strict=True)))
        for index in range(size)
    ]
    return tuple(torch.stack(tensors) for tensors in zip(*results, strict=True)), (0,) * len(results[0])


# -- registration ---------------------------------------------------------------------------------------------------

LIBRARY.impl("attention_forward", _forward_cpu, "CPU")
torch.library.register_fake(_FORWARD, _forward_fake, lib=LIBRARY)
autograd.register_through(_FORWARD, _CORRECTED, lib=LIBRARY)
LIBRARY.impl("attention_forward", _forward_autocast, "AutocastCPU")
LIBRARY.impl("attention_forward", _forward_autocast, "AutocastMPS")
torch.library.register_vmap(_FORWARD, functools.partial(_forward_vmap, ops.attention_forward), lib=LIBRARY)
register_flop_formula(ops.attention_forward)(_forward_flops)

LIBRARY.impl("attention_forward_with_correction", _corrected_cpu, "CPU")
torch.library.register_fake(_CORRECTED, _corrected_fake, lib=LIBRARY)
autograd.register(_CORRECTED, _corrected_backward, setup_context=_corrected_setup, lib=LIBRARY)
torch.library.register_vmap(
    _CORRECTED, functools.partial(_forward_vmap, ops.attention_forward_with_correction), lib=LIBRARY
)
register_flop_formula(ops.attention_forward_with_correction)(_forward_flops)

LIBRARY.impl("attention_backward", _backward_cpu, "CPU")
torch.library.register_fake(_BACKWARD, _backward_fake, lib=LIBRARY)
autograd.register(_BACKWARD, _backward_backward, setup_context=_backward_setup, lib=LIBRARY)
torch.library.register_vmap(_BACKWARD, _backward_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_backward)(_backward_flops)
