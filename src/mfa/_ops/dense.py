"""Ops of attention: one problem per batch entry and head."""

from typing import Any

import torch
from torch import Tensor

from .. import _simulation, _torch, block_mask
from .._arguments import DENSE_GRADIENTS, Backward, Dense
from .._checks.dense import check_forward
from .._cpu.backward import attention_backward
from .._cpu.composition import backward_vjp
from .._cpu.forward import attention_forward, attention_forward_with_correction
from .._cpu.layout import empty_outputs, laid_out
from . import autograd
from .differentiable import register
from .family import Family, Given, Mapped, Outputs

_ROWS = ("query", "key", "value")
_PLAIN = {Tensor, float, int, type(None)}


def _shapes(arguments: Dense) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows = arguments.query.shape[:3]
    return (*rows, arguments.value.shape[3]), rows


def _empty_outputs(arguments: Dense) -> Outputs:
    return empty_outputs(arguments.query, arguments.value.shape[3])


def _backward(arguments: Dense, given: Backward) -> dict[str, Tensor]:
    found = attention_backward(arguments, given)
    return found | {name: laid_out(found[name], getattr(arguments, name)) for name in _ROWS if name in found}


# -- vmap: the mapped dimension becomes part of the batch -----------------------------------------------------------


def _folds(dims: Mapped, given: Given) -> bool:
    # Sinks, and gradients that are sums over the batch, are not per batch; dropout and block masks count batches.
    wanted = dict(zip(DENSE_GRADIENTS, given.get("output_mask", ()), strict=False))
    sums = any(asked for name, asked in wanted.items() if name not in _ROWS)
    return dims["sinks"] is given["block_mask"] is None and not sums and given["dropout_p"] == 0


def _fold(size: int, dims: Mapped, given: Given) -> list[Any]:
    query, dim = given["query"], dims["query"]
    batch = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    return [
        _folded(size, batch, dims[name], value) if isinstance(value, Tensor) else value for name, value in given.items()
    ]


def _folded(size: int, batch: int, dim: int | None, tensor: Tensor) -> Tensor:
    if dim is None:
        if tensor.dim() == 1 or (tensor.shape[0] == 1 and tensor.dim() == 4 and batch != 1):
            return tensor  # sinks, slopes, or a bias, for all batches alike
        tensor = tensor.expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
        if tensor.dim() == 2:  # slopes [Hq]
            tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _place(result: str) -> int:
    return 0


def _pairs(arguments: Dense) -> int:
    batch, heads, length, _ = arguments.query.shape
    return batch * heads * length * arguments.key.shape[2]


def _check_contents(arguments: Dense) -> None:
    if arguments.block_mask is not None:
        block_mask.check(arguments.block_mask, arguments.query.shape, arguments.key.shape[2])


register(
    Family(
        name="attention",
        arguments=Dense,
        gradients=DENSE_GRADIENTS,
        check=check_forward,
        check_contents=_check_contents,
        shapes=_shapes,
        empty_outputs=_empty_outputs,
        forward=attention_forward,
        forward_with_correction=attention_forward_with_correction,
        backward=_backward,
        backward_vjp=backward_vjp,
        folds=_folds,
        fold=_fold,
        place=_place,
        pairs=_pairs,
    )
)


# -- the way past the dispatcher ------------------------------------------------------------------------------------


def nothing_listens(arguments: tuple[Any, ...]) -> bool:
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
    return _PLAIN.issuperset(map(type, arguments)) and not autograd.wants_graph(arguments)
