"""The numerics rule for gradients: at most twice as far from float64 as plain PyTorch, plus 1e-6."""

from typing import Any

import oracle
import torch
from torch import Tensor


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


def float32_roundings(
    tensors: dict[str, Tensor], terms: dict[str, Any], grads: tuple[Tensor, Tensor | None], group: int
) -> dict[str, float]:
    """How far each gradient is from float64, about, if every term of every sum is rounded to float32.

    Independent roundings of terms add up like the root of the sum of their squares. Where a row sees one key, plain
    PyTorch is exact, since P is 1 and dP - delta is 0; no other order of the sums is. Of a bfloat16 out, backward has
    20 bits; and of 16-bit inputs the kernels sum products in one chain, which float32 gradients show.
    """
    eps = torch.finfo(torch.float32).eps * (1 if tensors["query"].dtype == torch.float32 else 2)
    q, k, v = (tensors[name].double() for name in ("query", "key", "value"))
    mask = tensors.get("attn_mask")
    bias = None if mask is None else mask[(None,) * (4 - mask.dim())]
    scores, seen = oracle.logits(q, k, bias=bias, alibi_slopes=tensors.get("alibi_slopes"), **terms)
    if not scores.numel():
        return {}
    distance = (torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])).double()
    weights, _ = oracle.weights(scores, seen, tensors.get("sinks"))
    out = weights @ v.repeat_interleave(group, dim=1)
    p = weights.square()
    if "alibi_slopes" in tensors:  # a score is rounded relative to its own size, which distances make large
        slopes = tensors["alibi_slopes"].double().reshape(-1, q.shape[1], 1, 1)
        p = p * (1 + slopes * distance.abs()).square()
    scale = 1 / q.shape[3] ** 0.5 if terms["scale"] is None else terms["scale"]
    q, k, v, d_out = (x.square() for x in (scale * q, scale * k, v, grads[0].double()))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    d_p = d_out @ v.transpose(-1, -2)
    delta = (d_out * out.square()).sum(-1, keepdim=True) * (16 if tensors["query"].dtype == torch.bfloat16 else 1)
    if grads[1] is not None:
        delta = delta + grads[1].double().square()[..., None]
    d_scores = p * (d_p + delta)
    squares = {
        "query": d_scores @ k,
        "key": (d_scores.transpose(-1, -2) @ q).unflatten(1, (-1, group)).sum(2),
        "value": (p.transpose(-1, -2) @ d_out).unflatten(1, (-1, group)).sum(2),
        "sinks": delta.sum((0, 2)),
        "alibi_slopes": (d_scores * distance.square()).sum((0, 2, 3)),
    }
    if bias is not None:
        squares["attn_mask"] = d_scores.sum_to_size(bias.shape)
    # Of few numbers, plain PyTorch's largest error may be small by chance. One chain of n terms also rounds n partial
    # sums: on average, the squares of those are n / 2 times those of the terms.
    rows, keys = group * scores.shape[2], scores.shape[3]
    chains = {"query": keys, "key": rows, "value": rows}
    factors = {name: max(4, 1 + chains.get(name, 0) / 2) if x.numel() < 512 else 1 for name, x in squares.items()}
    return {name: eps * (factors[name] * float(x.max())) ** 0.5 for name, x in squares.items()}


def tolerance(plain: Tensor, expected: Tensor, rounding: float) -> float:
    """What a gradient may be away from `expected`, float64.

    Args:
        plain: what PyTorch's own operations give, in the gradient's dtype.
        rounding: of `float32_roundings`.
    """
    if 0 < plain.numel() < 512:  # as above
        rounding = max(rounding, torch.finfo(plain.dtype).eps / 2 * float(expected.abs().max()))
    return 2 * max(oracle.largest_error(plain, expected), rounding) + 1e-6
