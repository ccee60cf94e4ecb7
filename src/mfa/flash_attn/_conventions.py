"""What flash-attn's functions have in common: the layout [B,L,H,D], and windows of which -1 is open."""

from collections.abc import Sequence

from torch import Tensor

from .._checks.numbers import index_of

Window = Sequence[int]
Bounds = tuple[int | None, int | None]


def heads_first(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 4:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4")
    return tensor.transpose(1, 2)


def unpacked(name: str, tensor: Tensor, parts: int, layout: str) -> tuple[Tensor, ...]:
    if tensor.dim() != layout.count(",") + 1 or tensor.shape[-3] != parts:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have shape {layout}")
    return tensor.unbind(-3)


def bounds(window_size: Window, causal: bool) -> Bounds:
    """mfa's window."""
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise TypeError(f"window_size is {window_size!r}; it must be a pair (left, right)")
    found = [index_of(bound) for bound in window_size]
    if None in found:
        raise TypeError(f"window_size is {tuple(window_size)!r}; its entries must be integers, -1 for open")
    left, right = (None if bound < 0 else bound for bound in found)
    return left, 0 if causal else right


def check_probs(name: str, wanted: bool, dropout_p: float) -> None:
    if wanted and dropout_p > 0:
        raise NotImplementedError(
            f"{name} is not supported with dropout_p; without it, there are the lse and an empty tensor"
        )


def refuse(instead: str, **arguments: object) -> None:
    """What must be None: anything else would change the result."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported; it must be None: {instead}")
