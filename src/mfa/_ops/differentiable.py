"""What torch asks of a family of ops with gradients, made of what is the family's own.

    NAME_forward                    what is called
    NAME_forward_with_correction    what training calls instead: also what rounding took from out, for backward.
                                    Its last argument, which torch drops where it is True, says whether that makes
                                    gradients of more than query, key and value
    NAME_backward                   which has derivatives itself, by plain ATen operations

The first has no autograd of its own: where a call is recorded, it is one of the second.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Generic

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _simulation, _torch
from .._arguments import Backward, split
from .._checks.tensors import as_runtime_errors, check_results
from .._cpu.layout import empty_correction, empty_gradients
from . import autograd
from .autocast import autocast
from .family import Arguments, Corrected, Family, Outputs
from .library import LIBRARY, TRAINING, ops
from .vmap import Dims, Results, one_by_one, unfolded


class _Rules(Generic[Arguments]):
    """For each of the three ops its kernel on the CPU, fake, autograd, autocast, vmap and FLOPs, in that order."""

    family: Family[Arguments]
    arguments: type[Arguments]

    def __init__(self, family: Family[Arguments]) -> None:
        self.family = family
        self.arguments, self.gradients = family.arguments, family.gradients
        self.forward = getattr(ops, f"{family.name}_forward").default
        self.corrected = getattr(ops, f"{family.name}_forward_with_correction").default
        self.backward = getattr(ops, f"{family.name}_backward").default
        self.count = len(self.arguments._fields)
        self.of_gradients = operator.attrgetter(*self.gradients)
        self.of_terms = operator.attrgetter(*self.gradients[3:])  # behind query, key and value

    def register(self) -> None:
        family, flops, fields = self.family, self.forward_flops, self.arguments._fields
        gradients = tuple(f"grad_{name}" for name in self.gradients)

        forward_cpu = functools.partial(self.forward_cpu, self.forward, family.forward)
        _register(self.forward, forward_cpu, self.forward_fake, flops)
        autograd.register_through(self.forward.name(), self.corrected.name(), self.trains_terms, lib=LIBRARY)
        for device in ("CPU", "MPS"):
            LIBRARY.impl(self.forward.name(), self.forward_autocast, f"Autocast{device}")
        self._register_vmap(self.forward, fields, ("out", "lse"))

        corrected_cpu = functools.partial(self.forward_cpu, self.corrected, family.forward_with_correction)
        _register(self.corrected, corrected_cpu, self.corrected_fake, flops)
        setup = self.corrected_setup
        autograd.register(self.corrected.name(), self.corrected_backward, setup_context=setup, lib=LIBRARY)
        self._register_vmap(self.corrected, fields + TRAINING, ("out", "lse", "correction"))

        _register(self.backward, self.backward_cpu, self.backward_fake, self.backward_flops)
        setup = self.backward_setup
        autograd.register(self.backward.name(), self.backward_backward, setup_context=setup, lib=LIBRARY)
        self._register_vmap(self.backward, fields + Backward._fields, gradients)

    # -- NAME_forward ------------------------------------------------------------------------------------------------

    def forward_cpu(self, op: Any, on_cpu: Callable[[Arguments], Any], *args: Any) -> Any:
        """What a forward op returns for CPU tensors; `on_cpu` is its implementation outside of a simulation."""
        arguments, simulation = self.arguments._make(args[: self.count]), _simulation.active()
        self.family.check(arguments, metal=simulation is not None, drawn=True)
        if self.family.check_contents is not None:
            self.family.check_contents(arguments)
        if simulation is not None:  # what an MPS tensor reaches
            return simulation.call(op, *args)
        with _torch.below_autograd():
            return on_cpu(arguments)

    def forward_fake(self, *args: Any, **keywords: Any) -> Outputs:
        arguments = self.arguments(*args, **keywords)
        self.family.check(arguments, metal=arguments.query.device.type == "mps", drawn=True)
        return self.family.empty_outputs(arguments)

    def forward_autocast(self, *args: Any) -> Outputs:
        arguments = self.arguments._make(args)
        device = arguments.query.device.type
        with torch.autocast(device, enabled=False):
            outputs: Outputs = self.forward(*autocast(device, arguments))
        return outputs

    def forward_flops(self, *args: Any, **_: Any) -> int:
        arguments = self.arguments._make(args[: self.count])
        return 2 * self.family.pairs(arguments) * (arguments.query.shape[-1] + arguments.value.shape[-1])

    # -- NAME_forward_with_correction --------------------------------------------------------------------------------

    def trains_terms(self, args: tuple[Any, ...]) -> bool:
        terms = self.of_terms(self.arguments._make(args))
        return any(term is not None and term.requires_grad for term in terms)

    def corrected_fake(self, *args: Any, **keywords: Any) -> Corrected:
        keywords.pop("trains_terms", None)
        out, lse = self.forward_fake(*args[: self.count], **keywords)
        return out, lse, empty_correction(out)

    def corrected_setup(self, ctx: Any, inputs: tuple[Any, ...], output: Corrected) -> None:
        out, lse, correction = output
        ctx.mark_non_differentiable(correction)
        ctx.set_materialize_grads(False)
        arguments = self.arguments._make(inputs[: self.count])
        autograd.save(ctx, arguments, out, lse, correction if out.dtype.itemsize == 2 else None)

    def corrected_backward(
        self, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        arguments, (out, lse, correction) = autograd.saved(ctx)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        mask = self.of_gradients(self.arguments._make(ctx.needs_input_grad[: self.count]))
        grads = self.backward(*arguments, grad_out, grad_lse, out, lse, correction, mask)
        found = {name: grad for name, grad, asked in zip(self.gradients, grads, mask, strict=True) if asked}
        return tuple(map(found.get, self.arguments._fields + TRAINING))

    # -- NAME_backward -----------------------------------------------------------------------------------------------

    def backward_cpu(self, *args: Any) -> tuple[Tensor, ...]:
        (arguments, given), simulation = split(self.arguments, args), _simulation.active()
        self.family.check(arguments, metal=simulation is not None, drawn=True)
        check_results(given, arguments.query, *self.family.shapes(arguments))
        if self.family.check_contents is not None:
            self.family.check_contents(arguments)
        if simulation is not None:  # what an MPS tensor reaches
            outputs: tuple[Tensor, ...] = simulation.call(self.backward, *args)
            return outputs
        with _torch.below_autograd():
            grads = self.family.backward(arguments, given)
        return tuple(grads[name] if name in grads else arguments.query.new_empty(0) for name in self.gradients)

    def backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        arguments, given = split(self.arguments, args)
        inputs = {name: getattr(arguments, name) for name in self.gradients}
        return empty_gradients(inputs, given.output_mask)

    def backward_setup(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        arguments, given = split(self.arguments, inputs)
        ctx.mask = given.output_mask
        autograd.save(ctx, arguments, given.grad_out, given.grad_lse)

    def backward_backward(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The results are functions of all arguments but out, lse and correction, which are results of the others."""
        arguments, (grad_out, grad_lse) = autograd.saved(ctx)
        asked = zip(self.gradients, grads, ctx.mask, strict=True)
        cotangents = {name: grad if wanted else None for name, grad, wanted in asked}
        found = self.family.backward_vjp(arguments, grad_out, grad_lse, cotangents)
        fields = zip(self.arguments._fields + Backward._fields, ctx.needs_input_grad, strict=False)
        return tuple(found.get(name) if needed else None for name, needed in fields)

    def backward_flops(self, *args: Any, **_: Any) -> int:
        arguments, _given = split(self.arguments, args)
        return 2 * self.family.pairs(arguments) * (3 * arguments.query.shape[-1] + 2 * arguments.value.shape[-1])

    # -- all three ---------------------------------------------------------------------------------------------------

    def _register_vmap(self, op: Any, fields: tuple[str, ...], results: tuple[str, ...]) -> None:
        vmap = functools.partial(self.vmap, op, fields, results)
        torch.library.register_vmap(op.name(), vmap, lib=LIBRARY)

    def vmap(
        self, op: Any, fields: tuple[str, ...], results: tuple[str, ...], info: Any, in_dims: Dims, *args: Any
    ) -> Results:
        dims, given = dict(zip(fields, in_dims, strict=False)), dict(zip(fields, args, strict=False))
        if not self.family.folds(dims, given):
            return one_by_one(op, info.batch_size, in_dims, args)
        tensors = op(*self.family.fold(info.batch_size, dims, given))
        places = map(self.family.place, results)
        found = [unfolded(info.batch_size, place, tensor) for place, tensor in zip(places, tensors, strict=True)]
        return tuple(tensor for tensor, _ in found), tuple(dim for _, dim in found)


def _register(op: Any, on_cpu: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]) -> None:
    LIBRARY.impl(op.name(), as_runtime_errors(on_cpu), "CPU")
    torch.library.register_fake(op.name(), as_runtime_errors(fake), lib=LIBRARY)
    register_flop_formula(op.overloadpacket, get_raw=True)(flops)


def register(family: Family[Arguments]) -> None:
    """Registers all of a family's rules."""
    _Rules(family).register()
