"""The numerics rule for gradients: at most twice as far from float64 as plain PyTorch, plus 4e-6."""

from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor

# The rule is about the largest of many errors. Of few numbers plain PyTorch may be exact by luck, as a gradient of one
# head's slope or sink is: it then computes them in so many orders of its sums that this many errors are known.
MANY = 64

Attention = Callable[..., tuple[Tensor, Tensor]]


def differentiate(function: Any, leaves: dict[str, Tensor], grads: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of the leaves that require one; `grads` are those of out and lse, None for none."""
    out, lse = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    objective = (out * grads[0].to(out.dtype)).sum()
    if grads[1] is not None:  # the lse of a row that sees nothing is -inf, and has no gradient
        objective = objective + (lse.masked_fill(lse.isinf(), 0) * grads[1].to(lse.dtype)).sum()
    found = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), found, strict=True)
    }


def reordered(attention: Attention, order: int) -> Attention:
    """`attention`, which sums over head dimensions in another order: the same but for rounding. As it is for 0."""

    def call(query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(order)
        dims, value_dims = (torch.randperm(x.shape[-1], generator=generator) for x in (query, value))
        out, lse = attention(query[..., dims], key[..., dims], value[..., value_dims], **terms)
        return out[..., value_dims.argsort()], lse

    return call if order else attention


def bounds(plain: Callable[[int], dict[str, Tensor]], expected: dict[str, Tensor]) -> dict[str, float]:
    """What each gradient may be away from `expected`, float64.

    Args:
        plain: the gradients that PyTorch's own operations give, in the gradients' dtypes, in the order of `reordered`.
    """
    orders = {name: -(-MANY // x.numel()) if x.numel() else 1 for name, x in expected.items()}
    largest = dict.fromkeys(expected, 0.0)
    for order in range(max(orders.values(), default=0)):
        for name, x in plain(order).items():
            if order < orders[name]:
                largest[name] = max(largest[name], oracle.tolerance(x, expected[name], gradient=True))
    return largest
