"""`torch.library.register_autograd` that works inside torch.func.grad, vjp and jacrev, and refuses forward-mode AD.

torch's own refuses the former, and lets the latter's tangents vanish: torch.func.jvp and hessian would be zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad


def register(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None], lib: torch.library.Library
) -> None:
    """As `torch.library.register_autograd`, for an op without keyword-only arguments and lists of tensors."""
    op = torch._library.utils.lookup_op(name)
    outside = make_autograd_impl(op, Info(backward, setup_context))

    class Level(torch.autograd.Function):
        """One level of torch.func: the redispatch goes to the next."""

        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            # The levels below differentiate as well, but a Function's forward has both modes off.
            with (
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
                torch._C._AutoDispatchBelowAutograd(),
            ):
                result = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
            filled, _ = torch._library.utils.fill_defaults(op._schema, arguments, {})
            setup_context(ctx=ctx, inputs=filled, output=result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *backward(Needs(ctx), *grads)

    class Needs:
        """The context without its first input, the key set."""

        def __init__(self, ctx: Any) -> None:
            self._ctx = ctx

        def __getattr__(self, attribute: str) -> Any:
            found = getattr(self._ctx, attribute)
            return found[1:] if attribute == "needs_input_grad" else found

    def kernel(keyset: Any, *arguments: Any) -> Any:
        _refuse_tangents(name, arguments)
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if not needed or not torch._C._are_functorch_transforms_active():
            return outside(keyset, *arguments)
        with enable_single_level_autograd_function():
            apply: Any = super(torch.autograd.Function, Level).apply  # Function.apply would start at the top level
            return apply(keyset, *arguments)

    lib.impl(name.split("::")[1], kernel, "Autograd", with_keyset=True)


def register_through(name: str, through: str, *, lib: torch.library.Library) -> None:
    """Autograd of an op that another one does as well, with further results that backward needs.

    Args:
        name: the op; what it returns are the first results of `through`.
        through: takes the same arguments, and has autograd.
    """
    op, other = (torch._library.utils.lookup_op(each) for each in (name, through))
    results = len(op._schema.returns)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        _refuse_tangents(name, arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return other.redispatch(keyset, *arguments)[:results]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    lib.impl(name.split("::")[1], kernel, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
        raise NotImplementedError(
            f"{name} has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad): use reverse "
            "mode, for a Hessian torch.func.jacrev twice"
        )


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
