"""The union of two attentions over disjoint keys."""

import math

import torch
from torch import Tensor

from ._checks.tensors import DTYPES, check_is_tensor, dtype_name


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, packed: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over the keys of a and those of b, which have none in common.

        lse = log(exp(lse_a) + exp(lse_b)),  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Exact but for rounding, for any lse: no exponential overflows, and a part that saw nothing (lse -inf) counts for
    nothing, whatever its out holds. Differentiable in all four, any number of times. Sinks must be in one of the
    parts only. Computed in float32, or float64 for float64 (Milakov and Gimelshein 2018; as in flash-decoding).

    Args:
        out_a, out_b: [B,Hq,Lq,Dv] or [Hq,Lq,Dv], as `mfa.attention` returns it, or [Tq,Hq,Dv] of
            `mfa.attention_varlen`; floating point.
        lse_a, lse_b: float32 (or float64), natural logarithms: out's shape without Dv; [Hq,Tq] for packed sequences.
        packed: whether out is [Tq,Hq,Dv]. None tells by the shapes, and refuses if Tq equals Hq.

    Returns:
        out and lse, of the shapes and dtypes of a's.

    Raises:
        ValueError: shapes that don't agree, different devices, or an out of three dimensions that may be packed or not.
        TypeError: dtypes that differ or aren't supported.
    """
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_is_tensor(name, tensor)
    packed = _check(out_a, lse_a, out_b, lse_b, packed)
    wide = torch.promote_types(out_a.dtype, torch.float32)

    # The shift changes nothing but the range, so it has no gradient.
    shift = torch.maximum(lse_a, lse_b).detach()
    shift = shift.masked_fill(shift == -math.inf, 0)
    weights = [torch.exp(lse - shift) for lse in (lse_a, lse_b)]
    total = weights[0] + weights[1]
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    lse = (shift + torch.log(total)).masked_fill(nothing, -math.inf)

    out = None
    for part, part_lse, weight in ((out_a, lse_a, weights[0]), (out_b, lse_b, weights[1])):
        share, hidden = weight / total, part_lse == -math.inf
        if packed:
            share, hidden = share.t(), hidden.t()
        term = part.to(wide).masked_fill(hidden.unsqueeze(-1), 0) * share.unsqueeze(-1)
        out = term if out is None else out + term
    assert out is not None
    return out.to(out_a.dtype), lse


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, packed: bool | None) -> bool:
    """Whether out is packed."""
    for name, tensor, dtypes in (
        ("out_a", out_a, DTYPES),
        ("out_b", out_b, (out_a.dtype,)),
        ("lse_a", lse_a, (torch.float32, torch.float64)),
        ("lse_b", lse_b, (lse_a.dtype,)),
    ):
        if tensor.dtype not in dtypes:
            names = " or ".join(map(dtype_name, dtypes))
            raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be {names}")
        if tensor.device != out_a.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the device of out_a, {out_a.device}")
    if out_a.dim() not in (3, 4):
        raise ValueError(f"out_a has {out_a.dim()} dimensions; it must have 3 or 4")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b has shape {list(out_b.shape)}; it must have that of out_a, {list(out_a.shape)}")
    rows = tuple(out_a.shape[:-1])
    if packed is None:
        if out_a.dim() == 3 and rows[0] == rows[1] and rows[0] > 1:
            raise ValueError(
                f"out_a has shape {list(out_a.shape)}, either [Hq,Lq,Dv] or [Tq,Hq,Dv]; packed must be False or True"
            )
        packed = out_a.dim() == 3 and tuple(lse_a.shape) == rows[::-1] != rows
    elif packed and out_a.dim() != 3:
        raise ValueError(f"packed is True; out_a must have 3 dimensions then, and has {out_a.dim()}")
    if packed:
        rows = rows[::-1]
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(tensor.shape) != rows:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must have shape {list(rows)}")
    return packed
