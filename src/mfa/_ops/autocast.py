"""What autocast makes of tensors."""

from typing import Any, TypeVar

import torch

from .._arguments import Dense, Varlen

_Arguments = TypeVar("_Arguments", Dense, Varlen)

# Tensors that are cast, unless they have one of these dtypes: float32 where an op takes that too.
_KEPT = {
    **dict.fromkeys(("query", "key", "value"), (torch.float64,)),
    **dict.fromkeys(("bias", "sinks"), (torch.float32, torch.float64)),
}


def autocast(device: str, arguments: _Arguments) -> _Arguments:
    """The arguments in autocast's dtype."""
    dtype = torch.get_autocast_dtype(device)
    cast: dict[str, Any] = {}
    for name, kept in _KEPT.items():
        tensor = getattr(arguments, name, None)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in kept:
            cast[name] = tensor.to(dtype)
    return arguments._replace(**cast)
