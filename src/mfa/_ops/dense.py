"""Ops of attention: one problem per batch entry and head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _simulation, _torch
from .._arguments import DENSE_GRADIENTS, Backward, Dense
from .._checks.dense import check_forward
from .._cpu.backward import attention_backward
from .._cpu.composition import backward_vjp
from .._cpu.forward import attention_forward, attention_forward_with_correction
from .._cpu.layout import empty_outputs, laid_out
from . import autograd
from .differentiable import register
from .family import Corrected, Family, Outputs

_ROWS = ("query", "key", "value")


class _Dense(Family[Dense]):
    name = "attention"
    arguments = Dense
    gradients = DENSE_GRADIENTS

    def check(self, arguments: Dense, *, metal: bool) -> None:
        check_forward(arguments, metal=metal)

    def shapes(self, arguments: Dense) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows = arguments.query.shape[:3]
        return (*rows, arguments.value.shape[3]), rows

    def empty_outputs(self, arguments: Dense) -> Outputs:
        return empty_outputs(arguments.query, arguments.value.shape[3])

    def forward(self, arguments: Dense) -> Outputs:
        return attention_forward(arguments)

    def forward_with_correction(self, arguments: Dense) -> Corrected:
        return attention_forward_with_correction(arguments)

    def backward(self, arguments: Dense, given: Backward) -> Mapping[str, Tensor]:
        found = attention_backward(arguments, given)
        rows = {name: laid_out(found[name], getattr(arguments, name)) for name in _ROWS if name in found}
        return found | rows

    def backward_vjp(
        self, arguments: Dense, grad_out: Tensor, grad_lse: Tensor | None, cotangents: Mapping[str, Tensor | None]
    ) -> Mapping[str, Tensor]:
        return backward_vjp(arguments, grad_out, grad_lse, cotangents)

    def folds(self, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> bool:
        # Sinks, and gradients that are sums over the batch, are not per batch; dropout counts batches.
        wanted = dict(zip(DENSE_GRADIENTS, given.get("output_mask", ()), strict=False))
        sums = any(asked for name, asked in wanted.items() if name not in _ROWS)
        return dims["sinks"] is None and not sums and given["dropout_p"] == 0

    def fold(self, size: int, dims: Mapping[str, int | None], given: Mapping[str, Any]) -> list[Any]:
        """The mapped dimension becomes part of the batch."""
        query, dim = given["query"], dims["query"]
        batch = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
        return [
            _folded(size, batch, dims[name], value) if isinstance(value, Tensor) else value
            for name, value in given.items()
        ]

    def place(self, result: str) -> int:
        return 0

    def pairs(self, arguments: Dense) -> int:
        batch, heads, length, _ = arguments.query.shape
        return batch * heads * length * arguments.key.shape[2]


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


def nothing_listens(arguments: Dense) -> bool:
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
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and autograd.requires_grad(*tensors):
        return False
    return all(type(tensor) is Tensor for tensor in tensors)


register(_Dense())
