"""Attention as plain ATen operations on whole matrices: the second derivative, at the cost of O(L^2) memory.

Fused kernels give the first derivative only. `backward_vjp` differentiates this composition twice, and is itself
differentiable, so that derivatives of any order are right.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _log
from .blocks import HIDDEN

_MASKING = -1e38  # a bias of at most this hides its key
_Scalars = tuple[float, int | None, int | None, float]  # scale, window_left, window_right, softcap
_Inputs = Sequence[Tensor | None]  # query, key, value, bias, sinks, alibi_slopes


def attention(inputs: _Inputs, scalars: _Scalars, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """`mfa::attention_forward`: out [B,Hq,Lq,Dv], lse [B,Hq,Lq] in the dtype of the scores.

    `factors`, [B,Hq,Lq,Lk], are what dropout multiplies probabilities by.

    Whatever is hidden is replaced before it is used, so that no derivative of any order has a NaN of its own making.
    """
    query, key, value, bias, sinks, alibi_slopes = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    scale, left, right, softcap = scalars
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, rows, _), (_, key_heads, columns, _) = query.shape, key.shape
    if heads == 0 or columns == 0:  # no softmax over nothing
        lse = query.new_full((batch, heads, rows), HIDDEN, dtype=dtype)
        lse = lse if sinks is None else sinks[:, None].to(dtype).expand(lse.shape)
        return query.new_zeros((batch, heads, rows, value.shape[3])), lse

    grouped = query.to(dtype).unflatten(1, (key_heads, heads // key_heads))
    scores = torch.einsum("bhgid,bhjd->bhgij", grouped, key.to(dtype)).flatten(1, 2) * scale
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
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        masked = bias <= _MASKING
        seen = seen & ~masked
        scores = scores + torch.where(masked, 0, bias.to(dtype))
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.reshape(-1, heads, 1, 1).to(dtype) * offset.abs()

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
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: _Inputs,
    scalars: _Scalars,
    factors: Tensor | None,
    cotangents: _Inputs,
) -> list[Tensor | None]:
    """What the backward pass's results pass on to its arguments.

    Args:
        grad_out: [B,Hq,Lq,Dv]. grad_lse: [B,Hq,Lq]. factors: as in `attention`.
        cotangents: one for each of `inputs`, None for a gradient that nobody asked for.

    Returns:
        Gradients of grad_out, grad_lse and the six inputs; None for what isn't a floating-point tensor.
    """
    _log.once("second derivatives of attention have no kernel: ATen computes them on whole Lq x Lk matrices")
    arguments = (grad_out, grad_lse, *inputs)
    places = [i for i, tensor in enumerate(arguments) if is_floating(tensor)]
    wanted = [place for place in places if place >= 2 and cotangents[place - 2] is not None]

    def backward(*primals: Tensor) -> tuple[Tensor, ...]:
        filled = dict(zip(places, primals, strict=True))
        given = [filled.get(i, tensor) for i, tensor in enumerate(arguments)]

        def forward(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            replaced = dict(zip(wanted, leaves, strict=True))
            return attention([replaced.get(i, given[i]) for i in range(2, 8)], scalars, factors)

        d_out, d_lse = given[:2]
        assert d_out is not None
        d_lse = d_out.new_zeros(d_out.shape[:3]) if d_lse is None else d_lse
        vjp = torch.func.vjp(forward, *(filled[place] for place in wanted))[1]
        grads: tuple[Tensor, ...] = vjp((d_out, d_lse.to(torch.promote_types(d_out.dtype, torch.float32))))
        return grads

    vjp = torch.func.vjp(backward, *(tensor for tensor in arguments if is_floating(tensor)))[1]
    grads = iter(vjp(tuple(cotangents[place - 2] for place in wanted)))
    return [next(grads) if is_floating(tensor) else None for tensor in arguments]


def is_floating(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()
