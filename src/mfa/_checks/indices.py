"""Checks of index tensors, and of what packed and cached attention have in common.

Shapes and dtypes are checked everywhere; contents only where the host can read them without waiting for a device.
"""

import torch
from torch import Tensor

from .. import _torch
from .sizes import holds
from .tensors import check_is_tensor, dtype_name


def host_values(tensor: Tensor) -> list[int] | None:
    """Contents of an integer tensor, or None where there are none yet, or where reading them would wait."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return None
    if _torch.is_wrapped(tensor):
        return None
    values: list[int] = tensor.flatten().tolist()
    return values


def check_index_tensor(name: str, tensor: object, query: Tensor, shape: str, sizes: tuple[int | None, ...]) -> None:
    """An int32 tensor on the query's device, of these sizes; None is any size. `shape` names them."""
    check_is_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on the device of query, {query.device}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be int32")
    pairs = zip(tensor.shape, sizes, strict=False)
    if tensor.dim() != len(sizes) or not all(size is None or holds(found == size) for found, size in pairs):
        known = "" if None in sizes else f" = {list(sizes)}"
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have shape {shape}{known}")
