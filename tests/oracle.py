"""What attention is, in float64 on whole matrices: written from api.md, sharing no code with the package.

`attention()` is the reference. `composition()` is what plain PyTorch makes of the same problem in the problem's own
dtype, and `tolerance()` the project's numerics rule.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HIDING = float(torch.tensor(-1e38))  # what a float32 bias of -1e38 is: a little more than that


def visible(length_q: int, length_k: int, window: tuple[int | None, int | None]) -> Tensor:
    """bool [Lq,Lk]: query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right."""
    left, right = window
    seen = torch.ones(length_q, length_k, dtype=torch.bool)
    for i in range(length_q):
        for j in range(length_k):
            diagonal = i + length_k - length_q
            seen[i, j] = (left is None or j >= diagonal - left) and (right is None or j <= diagonal + right)
    return seen


def logits(
    query: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    is_causal: bool = False,
    softcap: float = 0.0,
    order: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [B,Hq,Lq,Lk] in the dtype of query, and which of them count. Key has Hq heads or a divisor of it.

    `order`: the positions of the queries and of the keys that are given, [Lq] and [Lk], where they are shuffled.
    """
    _, heads, length_q, dim = query.shape
    length_k = key.shape[2]
    key = key.repeat_interleave(heads // max(1, key.shape[1]), dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    rows, columns = order or (torch.arange(length_q), torch.arange(length_k))
    seen = visible(length_q, length_k, window)
    if is_causal:
        seen = seen & torch.ones(length_q, length_k, dtype=torch.bool).tril()
    seen = seen[rows][:, columns].expand(scores.shape)
    if bias is not None:
        bias = bias.expand(scores.shape)
        bias = bias if order is None else bias[:, :, rows][..., columns]
        if bias.dtype == torch.bool:
            seen = seen & bias
        else:
            seen = seen & ~(bias <= HIDING)
            scores = scores + bias.to(scores.dtype)
    if alibi_slopes is not None:
        i = rows[:, None].to(scores.dtype) + (length_k - length_q)
        j = columns.to(scores.dtype)
        slopes = alibi_slopes.to(scores.dtype).reshape(-1, heads, 1, 1)
        scores = scores - slopes * (i - j).abs()
    return scores, seen


def weights(scores: Tensor, seen: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp; a row without a key has probability 0 and lse -inf, or the sink."""
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    unseen = (lse == -math.inf)[..., None]
    probability = torch.softmax(scores.masked_fill(unseen, 0), dim=-1).masked_fill(unseen, 0)
    return probability[..., : seen.shape[-1]], lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor | None = None, **terms: object
) -> tuple[Tensor, Tensor]:
    """Float64 out [B,Hq,Lq,Dv] and lse [B,Hq,Lq] for 4-dimensional inputs; differentiable. Terms as in `logits`."""
    scores, seen = logits(query.double(), key.double(), **terms)  # type: ignore[arg-type]
    probability, lse = weights(scores, seen, sinks)
    value = value.double().repeat_interleave(query.shape[1] // max(1, value.shape[1]), dim=1)
    return torch.einsum("bhij,bhjd->bhid", probability, value), lse


def composition(
    query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor | None = None, **terms: object
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of query, and lse in float32, by PyTorch's own operations in that dtype.

    Out is torch's math SDPA where that has the features. Elsewhere it is the same recipe written out: like torch's, it
    computes half types in float32 and rounds once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores, seen = logits(query.to(wide), key.to(wide), **terms)  # type: ignore[arg-type]
    probability, lse = weights(scores, seen, sinks)
    group = query.shape[1] // max(1, key.shape[1])
    if sinks is None and not terms.get("softcap"):
        mask = torch.zeros(seen.shape, dtype=wide)
        for name in ("bias", "alibi_slopes"):
            if terms.get(name) is not None:
                unit = {**terms, "scale": 0.0, "softcap": 0.0, "bias": None, "alibi_slopes": None, name: terms[name]}
                mask = mask + logits(query.to(wide) * 0, key.to(wide) * 0, **unit)[0]  # type: ignore[arg-type]
        mask = mask.masked_fill(~seen, -math.inf)
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                query.to(query.dtype),
                key.repeat_interleave(group, dim=1),
                value.repeat_interleave(group, dim=1),
                attn_mask=mask.to(wide),
                scale=terms.get("scale"),  # type: ignore[arg-type]
            )
    else:
        out = torch.einsum("bhij,bhjd->bhid", probability, value.to(wide).repeat_interleave(group, dim=1))
    return out.to(query.dtype), lse.float()


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; equal infinities differ by 0, and NaN is an infinite error."""
    difference = (actual.double() - expected.double()).abs()
    difference = difference.masked_fill(actual.double() == expected.double(), 0)
    return float(difference.nan_to_num(nan=math.inf).max().detach()) if difference.numel() else 0.0


def tolerance(plain: Tensor, expected: Tensor, *, gradient: bool = False, summands: Tensor | None = None) -> float:
    """The numerics rule: twice the error of plain PyTorch in the same dtype, plus 1e-6, for gradients plus 4e-6.

    The rule means the largest error of many numbers. Of few, plain PyTorch's may be 0 by luck: for those, give the
    absolute values that were summed, and the error is taken to be at least one rounding of the largest.
    """
    error = largest_error(plain, expected)
    if summands is not None and summands.numel():
        error = max(error, torch.finfo(plain.dtype).eps / 2 * float(summands.max()))
    return 2 * error + (4e-6 if gradient else 1e-6)
