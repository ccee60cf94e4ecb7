"""Comparisons of sizes, where torch.compile and torch.export may trace a size that only a run can tell.

Such a size comes from data: `x[keep]`, `lengths.max().item()`. Python's `if` would ask for its value.
"""

from collections.abc import Sequence

import torch

from .. import _torch


def _is_plain(condition: object) -> bool:
    return not torch.compiler.is_compiling() and isinstance(condition, bool)


def holds(condition: bool) -> bool:
    """Whether what is demanded of an argument holds; what only a run can tell is taken for true, and asserted there."""
    if _is_plain(condition):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # slow to import

    if not guard_or_true(condition):
        return False
    _torch.check(condition)
    return True


def is_known(condition: bool) -> bool:
    """Whether a condition holds for all that is known: for a choice between ways that are both right if it does."""
    if _is_plain(condition):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def equal(shape: Sequence[int], other: Sequence[int]) -> bool:
    """`holds` of two shapes' equality."""
    if not torch.compiler.is_compiling() and {*map(type, shape), *map(type, other)} == {int}:
        return tuple(shape) == tuple(other)  # sooner than one by one
    return len(shape) == len(other) and all(holds(a == b) for a, b in zip(shape, other, strict=True))
