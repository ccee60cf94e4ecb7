"""Attention as plain ATen operations on whole matrices: the second derivative, at the cost of O(L^2) memory.

Fused kernels give the first derivative only. `backward_vjp` differentiates this composition twice, and is itself
differentiable, so that derivatives of any order are right.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _log, block_mask
from .._arguments import DENSE_GRADIENTS, Dense
from .blocks import HIDDEN
from .dropout import all_factors

_MASKING = -1e38  # a bias of at most this hides its key
_Tensors = Mapping[str, Tensor | None]


def attention(arguments: Dense, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """`mfa::attention_forward`: out [B,Hq,Lq,Dv], lse [B,Hq,Lq] in the dtype of the scores.

    `factors`, [B,Hq,Lq,Lk], are what dropout multiplies probabilities by.

    Whatever is hidden is replaced before it is used, so that no derivative of any order has a NaN of its own making.
    """
    query, key, value, bias, sinks = arguments.query, arguments.key, arguments.value, arguments.bias, arguments.sinks
    softcap, left, right = arguments.softcap, arguments.window_left, arguments.window_right
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, rows, _), (_, key_heads, columns, _) = query.shape, key.shape
    if heads == 0 or columns == 0:  # no softmax over nothing
        lse = query.new_full((batch, heads, rows), HIDDEN, dtype=dtype)
        lse = lse if sinks is None else sinks[:, None].to(dtype).expand(lse.shape)
        return query.new_zeros((batch, heads, rows, value.shape[3])), lse

    grouped = query.to(dtype).unflatten(1, (key_heads, heads // key_heads))
    scores = torch.einsum("bhgid,bhjd->bhgij", grouped, key.to(dtype)).flatten(1, 2) * arguments.scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # j - (i + Lk - Lq), which windows bound.
    position = torch.arange(columns, device=query.device) - torch.arange(rows, device=query.device)[:, None]
    offset = position - (columns - rows)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if left is not None:
        seen = seen & (offset >= -left)
    if right is not None:
        seen = seen & (offset <= right)
    if arguments.block_mask is not None:
        seen = seen & block_mask.dense(arguments.block_mask)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        masked = bias <= _MASKING
        seen = seen & ~masked
        scores = scores + torch.where(masked, 0, bias.to(dtype))
    if arguments.alibi_slopes is not None:
        scores = scores - arguments.alibi_slopes.reshape(-1, heads, 1, 1).to(dtype) * offset.abs()

    maximum = torch.where(seen, scores, HIDDEN).detach().amax(-1, keepdim=True)
    extra = None if sinks is None else sinks[:, None, None].to(dtype)
    if extra is not None:
        maximum = torch.maximum(maximum, extra.detach())
    maximum = torch.where(maximum == HIDDEN, 0, maximum)
    exponentials = torch.where(seen, torch.exp(torch.where(seen, scores - maximum, 0)), 0)
    total = exponentials.sum(-1, keepdim=True)
    if extra is not None:
        total = total + torch.exp(extra - maximum)
    is_empty = total == 0
    total = torch.where(is_empty, 1, total)
    probability = exponentials / total
    if factors is not None:
        probability = probability * factors
    probability = probability.unflatten(1, (key_heads, heads // key_heads))
    out = torch.einsum("bhgij,bhjd->bhgid", probability, value.to(dtype)).flatten(1, 2)
    lse = torch.where(is_empty, HIDDEN, maximum + torch.log(total)).squeeze(-1)
    return out.to(query.dtype), lse


def backward_vjp(
    arguments: Dense, grad_out: Tensor, grad_lse: Tensor | None, cotangents: _Tensors, first_batch: int = 0
) -> dict[str, Tensor]:
    """What the backward pass's results pass on to its arguments.

    Args:
        grad_out: [B,Hq,Lq,Dv]. grad_lse: [B,Hq,Lq].
        cotangents: of the gradients, by the names in DENSE_GRADIENTS; None or missing where nobody asked for one.
        first_batch: what dropout counts batches from.

    Returns:
        Gradients of grad_out, grad_lse and those arguments, by their names; none for what isn't floating-point.
    """
    _log.once("second derivatives of attention have no kernel: ATen computes them on whole Lq x Lk matrices")
    factors = all_factors(arguments, first_batch)
    given = {"grad_out": grad_out, "grad_lse": grad_lse, **{name: getattr(arguments, name) for name in DENSE_GRADIENTS}}
    floating = {name: tensor for name, tensor in given.items() if tensor is not None and tensor.is_floating_point()}
    asked = {name: cotangent for name, cotangent in cotangents.items() if cotangent is not None and name in floating}

    def backward(primals: dict[str, Tensor]) -> dict[str, Tensor]:
        results = {name: primals[name] for name in ("grad_out", "grad_lse") if name in primals}
        inputs: dict[str, Any] = {name: tensor for name, tensor in primals.items() if name not in results}

        def forward(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return attention(arguments._replace(**inputs | leaves), factors)

        d_out = results["grad_out"]
        d_lse = results.get("grad_lse", d_out.new_zeros(d_out.shape[:3]))
        vjp = torch.func.vjp(forward, {name: primals[name] for name in asked})[1]
        grads: dict[str, Tensor] = vjp((d_out, d_lse.to(torch.promote_types(d_out.dtype, torch.float32))))[0]
        return grads

    vjp = torch.func.vjp(backward, floating)[1]
    found: dict[str, Tensor] = vjp(asked)[0]
    return found
