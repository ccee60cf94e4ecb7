"""A family of ops with gradients: what differs between dense and packed attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from .._arguments import Backward, Dense, Varlen

Arguments = TypeVar("Arguments", Dense, Varlen)
Outputs = tuple[Tensor, Tensor]  # out, lse
Corrected = tuple[Tensor, Tensor, Tensor]  # out, lse, correction
Mapped = Mapping[str, int | None]  # where arguments are mapped by torch.vmap
Given = Mapping[str, Any]  # arguments, by their names


@dataclass(frozen=True)
class Family(Generic[Arguments]):
    """Functions without a word on devices are for CPU tensors, and get arguments that have been checked."""

    name: str  # of the ops, without what follows: see differentiable.py
    arguments: type[Arguments]
    gradients: tuple[str, ...]  # the arguments that have one, in the order of the backward op's results

    # Refuses arguments(metal: whether the Metal kernels are going to run, drawn: True); any device.
    check: Callable[..., None]
    # Refuses what the contents of tensors tell, where the host sees them.
    check_contents: Callable[[Arguments], None] | None
    # Shapes of out and lse; any device.
    shapes: Callable[[Arguments], tuple[tuple[int, ...], tuple[int, ...]]]
    # Out and lse, uninitialised, laid out as every backend lays them out; any device.
    empty_outputs: Callable[[Arguments], Outputs]

    forward: Callable[[Arguments], Outputs]
    forward_with_correction: Callable[[Arguments], Corrected]
    # The wanted gradients, laid out as every backend lays them out.
    backward: Callable[[Arguments, Backward], Mapping[str, Tensor]]
    # Gradients of grad_out, grad_lse and the arguments, from grad_out, grad_lse and those of the gradients; any device.
    backward_vjp: Callable[[Arguments, Tensor, Tensor | None, Mapping[str, Tensor | None]], Mapping[str, Tensor]]

    # torch.vmap: whether one call can do it all; its arguments; and where its result `name`, which is out, lse,
    # correction or the gradient of an argument, holds the mapped dimension.
    folds: Callable[[Mapped, Given], bool]
    fold: Callable[[int, Mapped, Given], list[Any]]
    place: Callable[[str], int]

    # How many (head, query, key) there are, batch entries included; any device.
    pairs: Callable[[Arguments], int]
