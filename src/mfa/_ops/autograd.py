"""`torch.library.register_autograd` that works inside torch.func.grad, vjp and jacrev, and refuses forward-mode AD.

torch's own refuses the former, and lets the latter's tangents vanish: torch.func.jvp and hessian would be zero.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _torch
from .._arguments import TENSORS, Dense, Varlen


def register(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None], lib: torch.library.Library
) -> None:
    """As `torch.library.register_autograd`, for an op without keyword-only arguments and lists of tensors, of whose
    arguments at most the last has a default.
    """
    op = _overload(name)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *arguments, keyset = inputs
        result = redispatch(op, keyset, arguments)
        setup_context(ctx=ctx, inputs=tuple(arguments), output=result)
        return result

    def forward_of_level(ctx: Any, *inputs: Any) -> Any:
        # The levels below differentiate as well, but a Function's forward has both modes off.
        with torch.enable_grad(), _torch.set_forward_mode(True):
            return forward(ctx, *inputs)

    def backward_and_keyset(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    def function(forward: Callable[..., Any], base: type) -> Any:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_keyset)}
        return type(name.replace("::", "_"), (base,), methods)

    whole, level = function(forward, torch.autograd.Function), function(forward_of_level, _torch.SingleLevelFunction)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        refuse_tangents(name, arguments)
        if not wants_graph(arguments):
            return redispatch(op, keyset, arguments)
        if not _torch.in_torch_func():
            return whole.apply(*arguments, keyset)
        with _torch.single_level():
            return level.apply(*arguments, keyset)

    lib.impl(op, kernel, "Autograd", with_keyset=True)


def register_through(
    name: str, through: str, last: Callable[[tuple[Any, ...]], Any], *, lib: torch.library.Library
) -> None:
    """Autograd of an op that another one does as well, with further results that backward needs.

    Args:
        name: the op; what it returns are the first two results of `through`.
        through: takes the same arguments and one more, and has autograd.
        last: that argument, from the others.
    """
    op, other = _overload(name), _overload(through)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        refuse_tangents(name, arguments)
        if wants_graph(arguments):
            return other.redispatch(keyset, *arguments, last(arguments))[:2]
        return redispatch(op, keyset, arguments)

    lib.impl(op, kernel, "Autograd", with_keyset=True)


class _Parts:
    """An op's arguments as tensors, which autograd keeps, and others."""

    def __init__(self, kind: type[Dense] | type[Varlen]) -> None:
        tensors = TENSORS[kind]
        others = [name for name in kind._fields if name not in tensors]
        self.count = len(tensors)
        self.tensors, self.others = operator.attrgetter(*tensors), operator.attrgetter(*others)
        self.in_order = operator.itemgetter(*map([*tensors, *others].index, kind._fields))


_PARTS = {kind: _Parts(kind) for kind in TENSORS}


def save(ctx: Any, arguments: Dense | Varlen, *more: Tensor | None) -> None:
    """Keeps an op's arguments, and more tensors, for its backward pass."""
    parts = _PARTS[type(arguments)]
    ctx.kind, ctx.others = type(arguments), parts.others(arguments)
    ctx.save_for_backward(*parts.tensors(arguments), *more)


def saved(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    """What `save` kept: the arguments, and the other tensors."""
    parts, tensors = _PARTS[ctx.kind], ctx.saved_tensors
    arguments = parts.in_order(tensors[: parts.count] + ctx.others)
    return ctx.kind._make(arguments), tensors[parts.count :]


def wants_graph(arguments: Sequence[Any]) -> bool:
    """Whether a call with these arguments is recorded."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _overload(name: str) -> Any:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


def redispatch(op: Any, keyset: Any, arguments: Any) -> Any:
    with _torch.below_autograd():
        return op.redispatch(keyset & _torch.after_autograd, *arguments)


def refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    if _torch.has_dual_level() and any(map(_has_tangent, arguments)):
        raise NotImplementedError(
            f"{name} has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad): use reverse "
            "mode, for a Hessian torch.func.jacrev twice"
        )


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None
