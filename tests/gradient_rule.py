"""The numerics rule for gradients: at most twice as far from float64 as plain PyTorch, plus 4e-6."""

from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor

# The rule is about the largest of many errors. Of few numbers plain PyTorch may be exact by luck, as a gradient of one
# head's slope or sink is: it then computes them in so many orders of its sums that MANY errors are known, but at most:
MANY, ORDERS = 512, 64
NEAR = 0.8  # from this share of the bound on, the orders are tried

Attention = Callable[..., tuple[Tensor, Tensor]]  # out and lse
Change = Callable[[Attention], Attention]


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


def unchanged(attention: Attention) -> Attention:
    return attention


def reordered(attention: Attention, order: int) -> Attention:
    """`attention`, which sums over head dimensions, queries and keys in another order: the same but for rounding.

    As it is for 0. `attention` also takes `order`, as oracle.logits does.
    """

    def call(query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(order)
        dims, value_dims = (torch.randperm(x.shape[-1], generator=generator) for x in (query, value))
        rows, columns = (torch.randperm(x.shape[-2], generator=generator) for x in (query, key))
        query, key, value = query[..., rows, :], key[..., columns, :], value[..., columns, :]
        terms["order"] = rows, columns
        out, lse = attention(query[..., dims], key[..., dims], value[..., value_dims], **terms)
        return out[..., rows.argsort(), :][..., value_dims.argsort()], lse[..., rows.argsort()]

    return call if order else attention


class _Recomputed(torch.autograd.Function):
    """Passes out and lse on. What delta = rowsum(dO * out) lacks acts like a gradient of lse: dS = P (dP - delta).

    And P = exp(S - lse) is wrong by a factor for each row, as what comes of it.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out, lse)
        ctx.dtype = dtype
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        out, lse = ctx.saved_tensors
        kept = out.to(ctx.dtype).to(out.dtype)
        kept += (out - kept).half()
        lacking = (d_out.double() * out.double()).sum(-1) - (d_out * kept).sum(-1)
        roundings = torch.rand(lse.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        factor = 1 + roundings * torch.finfo(torch.float32).eps * lse.masked_fill(lse.isinf(), 0).abs()
        return d_out * factor[..., None], (d_lse + lacking.to(d_lse.dtype)) * factor, None


def recomputed(attention: Attention, dtype: torch.dtype) -> Attention:
    """`attention` with the backward pass of kernels: they sum delta in float32, from an out of `dtype` and, in float16,
    what rounding took from it. Plain PyTorch's delta is the sum of P dP, which is exact where a row sees one key. And
    they make P again from an lse of float32, which is rounded; plain PyTorch's sums to 1 however large lse is.
    """

    def call(*tensors: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
        out, lse = _Recomputed.apply(*attention(*tensors, **terms), dtype)  # type: ignore[no-untyped-call]
        return out, lse

    return call


def shares(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    plain: Callable[[Change], dict[str, Tensor]],
    kernels: torch.dtype | None = None,
) -> dict[str, float]:
    """The largest error of each gradient, as a share of what it may be.

    Args:
        found, expected: gradients, and those in float64.
        plain: the gradients that PyTorch's own operations give, in the gradients' dtypes, of a changed attention.
        kernels: where kernels compute, the query's dtype. Gradients of mask, sinks and slopes are plain sums of dS, of
            any size: those of plain PyTorch then have delta from out, and P from lse, as well.
    """
    errors = {name: oracle.largest_error(grad, expected[name]) for name, grad in found.items()}
    found_shares: dict[str, float] = {}
    for orders in (1, ORDERS):  # the others take most of a test's time, and hardly ever matter
        allowed = _allowed(plain, expected, kernels, orders)
        found_shares = {name: error / allowed[name] for name, error in errors.items()}
        if max(found_shares.values(), default=0) < NEAR:
            break
    return found_shares


def _allowed(
    plain: Callable[[Change], dict[str, Tensor]], expected: dict[str, Tensor], kernels: torch.dtype | None, orders: int
) -> dict[str, float]:
    allowed = _bounds(plain, expected, orders)
    others = {name: x for name, x in expected.items() if name not in ("query", "key", "value")}
    if kernels is not None and others:
        allowed |= _bounds(lambda change: plain(lambda x: change(recomputed(x, kernels))), others, orders)
    return allowed


def _bounds(plain: Callable[[Change], dict[str, Tensor]], expected: dict[str, Tensor], orders: int) -> dict[str, float]:
    sizes = [x.numel() for x in expected.values() if x.numel()]
    largest = dict.fromkeys(expected, 0.0)
    for order in range(min(orders, -(-MANY // min(sizes, default=MANY)))):
        for name, x in plain(lambda attention: reordered(attention, order)).items():  # noqa: B023
            if name in expected:
                largest[name] = max(largest[name], oracle.tolerance(x, expected[name], gradient=True))
    return largest
