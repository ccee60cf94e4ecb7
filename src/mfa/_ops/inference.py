"""What the ops over caches, which have no gradients, have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _simulation, _torch
from .._checks.cache import QUANTIZED_DTYPES
from .._checks.tensors import as_runtime_errors
from . import autograd
from .library import LIBRARY, ops

Outputs = tuple[Tensor, Tensor]


def register(
    name: str,
    kind: type[Any],
    *,
    check: Callable[..., None],
    check_contents: Callable[[Any], None],
    on_cpu: Callable[[Any], Outputs],
    empty_outputs: Callable[[Any], Outputs],
    cast: tuple[str, ...],
    caches: tuple[str, ...],
) -> None:
    """The kernel on the CPU, fake and autocast of an op.

    Args:
        name: without the namespace.
        kind: its arguments, one of _arguments.py's.
        check: of them, with `metal`: the Metal kernels are going to run.
        check_contents: of index tensors, where the host sees them.
        on_cpu: its implementation outside of a simulation.
        empty_outputs: what it returns, without contents.
        cast: the arguments that autocast casts, to the dtype of `caches`.
    """
    op = getattr(ops, name).default

    @as_runtime_errors
    def kernel(*args: Any) -> Outputs:
        arguments, simulation = kind(*args), _simulation.active()
        check(arguments, metal=simulation is not None)
        check_contents(arguments)
        if simulation is not None:  # what an MPS tensor reaches
            outputs: Outputs = simulation.call(op, *args)
            return outputs
        with _torch.below_autograd():
            return on_cpu(arguments)

    @as_runtime_errors
    def fake(*args: Any, **keywords: Any) -> Outputs:
        arguments = kind(*args, **keywords)
        check(arguments, metal=arguments.query.device.type == "mps")
        return empty_outputs(arguments)

    def cast_and_call(*args: Any) -> Outputs:
        arguments = kind(*args)
        device = arguments.query.device.type
        with torch.autocast(device, enabled=False):
            kept = [getattr(arguments, cache) for cache in caches]
            outputs: Outputs = op(
                *arguments._replace(**{name: autocast(device, getattr(arguments, name), *kept) for name in cast})
            )
        return outputs

    LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"mfa::{name}", fake, lib=LIBRARY)
    for device in ("CPU", "MPS"):
        LIBRARY.impl(name, cast_and_call, f"Autocast{device}")


def refuse_gradients(name: str, sentence: str) -> None:
    """An op's backward pass is an error."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(sentence)

    autograd.register(f"mfa::{name}", backward, setup_context=setup, lib=LIBRARY)


def autocast(device: str, tensor: Tensor, *caches: Tensor) -> Tensor:
    """What autocast makes of a query, key or value: the caches' dtype, for they aren't cast, or else autocast's own."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    dtypes = (cache.dtype for cache in caches if cache.dtype not in QUANTIZED_DTYPES)
    return tensor.to(next(dtypes, None) or torch.get_autocast_dtype(device))
