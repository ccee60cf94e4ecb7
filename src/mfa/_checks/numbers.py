"""Numbers as users have them: Python's, NumPy's, symbolic ones, tensors without dimensions; as the ops take them."""

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .sizes import holds

_INT32_MAX = 2**31 - 1
_WIDEST = 2**62


def check_flag(name: str, value: object) -> None:
    """True or False, and nothing that only counts as such, as `F.scaled_dot_product_attention` takes it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def as_number(name: str, value: Any) -> float:
    """A `numbers.Real`, or a real tensor without dimensions, which is read: that waits for its device."""
    if type(value) in (int, float) or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.dtype == torch.bool or value.is_complex()):
        return value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    return float(value)


def as_integer(name: str, value: Any, largest: int = _INT32_MAX) -> int:
    """Within 0 ... `largest`: what Python takes as an index, or an integer tensor without dimensions, which is read."""
    found: int | None = index_of(value)
    if found is None:
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if not (holds(found >= 0) and holds(found <= largest)):
        raise ValueError(f"{name} is {found}; it must be within 0 ... {largest}")
    return found


def as_window(value: object) -> tuple[int | None, int | None]:
    """A pair of bounds, each None (open) or an integer of 64 bits."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"window is {value!r}; it must be a pair (left, right)")
    left, right = (None if side is None else _bound(tuple(value), side) for side in value)
    return left, right


def _bound(value: tuple[Any, ...], side: Any) -> int:
    found: int | None = index_of(side)
    if found is None:
        raise TypeError(f"window is {value!r}; its entries must be integers or None")
    if not (holds(found >= -_WIDEST) and holds(found <= _WIDEST)):
        raise ValueError(f"window is {value!r}; its entries must be within -2^62 ... 2^62, or None for open")
    return found


def index_of(value: Any) -> Any:
    """An integer, maybe a symbolic one; None for what is none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor):
        is_integer = value.dim() == 0 and value.dtype != torch.bool
        return value.item() if is_integer and not (value.is_floating_point() or value.is_complex()) else None
    try:
        return operator.index(value)
    except TypeError:
        return None
