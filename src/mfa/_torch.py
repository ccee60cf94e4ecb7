"""What the package uses of torch that torch doesn't document, each with the reason why nothing public does.

Nowhere else is such a name used (tests/test_torch_internals.py), so that a torch that lacks one is refused on import.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from torch._functorch import utils as functorch
    from torch._subclasses import FakeTensorMode as FakeTensorMode  # tensors without memory: documented under this name
    from torch.autograd import function
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # documented under this name

    # A kernel of autograd in Python passes its call on to the next kernel; under torch.no_grad it would get it back.
    # Below views too: a result that is a view of a kernel's buffer would not be allowed to change in place.
    below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
    after_autograd = torch._C._after_autograd_keyset

    # An op's kernel is called for one level of torch.func, where a public `autograd.Function` starts at the innermost.
    # This is what torch.func itself makes one level of a Function with (_ops/autograd.py).
    SingleLevelFunction = function._SingleLevelFunction
    single_level = functorch.enable_single_level_autograd_function
    set_forward_mode = forward_ad._set_fwd_grad_enabled

    # Who listens to a call: there are public ways to listen, and none to ask.
    in_torch_func = torch._C._are_functorch_transforms_active
    count_dispatch_modes = torch._C._len_torch_dispatch_stack
    count_function_modes = torch._C._len_torch_function_stack
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by torch.func, so that the host sees no contents
    forward_ad._current_level  # noqa: B018  # for has_dual_level

    # What sdpa_kernel(..., set_priority=True) has set can't be read otherwise.
    sdp_priority_order = torch._C._get_sdp_priority_order

    # What only a run can tell of sizes, it asserts: documented, but under this name.
    check: Callable[[bool], None] = torch._check

    # The simulator calls an op's kernel for MPS with tensors of the CPU; a call goes by the tensors' device.
    DispatchKey, DispatchKeySet = torch._C.DispatchKey, torch._C.DispatchKeySet

    # torch.compile asks them about the tensors that a graph gets.
    about_views = torch.Tensor._base.__get__, torch.Tensor._is_view  # type: ignore[union-attr]

    # Functions on a subclass of Tensor as if it were none: documented, but under this name.
    plain_functions = torch._C.DisableTorchFunctionSubclass
    tree_leaves, tree_map_only = pytree.tree_leaves, pytree.tree_map_only  # no public module has them
except (AttributeError, ImportError) as error:
    raise ImportError(f"torch {torch.__version__} lacks an internal that mfa needs: {error}") from error


def has_dual_level() -> bool:
    """Whether forward-mode differentiation is active, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def identity_of(storage: torch.UntypedStorage) -> int:
    """The same for all tensors that share the memory, which may have no address."""
    return int(storage._cdata)


def signature(op: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the arguments and of the results of an op, of `torch.ops`, with its overload."""
    schema = op._schema
    return tuple(argument.name for argument in schema.arguments), tuple(result.name for result in schema.returns)
