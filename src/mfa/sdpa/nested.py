"""F.scaled_dot_product_attention of nested tensors, by mfa.attention_varlen.

A jagged tensor calls an op that only reaches ATen's math, on strided nested tensors that it makes for it; that op is
what we take. torch makes such tensors on the CPU, but refuses to on `mps`: there, call mfa.attention_varlen with the
jagged tensor's values and offsets. With is_causal, torch asks no op at all: it raises.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _log
from ..varlen import attention_varlen

OP = "_scaled_dot_product_attention_math"
KEYS = ("NestedTensorCPU", "AutogradNestedTensor")

_aten = torch.ops.aten._scaled_dot_product_attention_math.default


def kernel(takes: Callable[[Tensor], bool], reasons_of_context: Callable[[], list[str]]) -> Callable[..., Any]:
    """The op's, for KEYS. `takes`: whether the device of a tensor is meant."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *terms: Any, **options: Any) -> Any:
        if takes(query):
            try:
                return _attend(reasons_of_context(), query, key, value, *terms, **options)
            except (NotImplementedError, TypeError, ValueError) as error:
                _log.once(f"scaled_dot_product_attention of nested tensors goes to ATen: {error}")
        return _aten.decompose(query, key, value, *terms, **options)

    return attend


def _attend(
    reasons: list[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Out, and nothing where the op returns the probabilities: F.scaled_dot_product_attention drops them."""
    for name, is_given in (
        ("attn_mask", attn_mask is not None),
        ("is_causal", is_causal),
        ("dropout_mask", dropout_mask is not None),
    ):
        if is_given:
            reasons.append(f"{name} is given, which mfa doesn't take with nested tensors")
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    (queries, starts, longest), (keys, key_starts, longest_key), (values, *_) = map(_packed, (query, key, value))
    if not enable_gqa and queries.shape[1] != keys.shape[1]:
        raise NotImplementedError("query and key have different numbers of heads, without enable_gqa")
    out = attention_varlen(
        queries, keys, values, starts, key_starts, longest, longest_key, scale=scale, dropout_p=dropout_p
    )
    lengths = starts.diff().tolist()
    parts = [part.transpose(0, 1) for part in out.split(lengths)]
    return torch.nested.as_nested_tensor(parts), out.new_empty(0)


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor, int]:
    """[B,H,L*,D] as [T,H,D], where its sequences end, and the longest of them."""
    if not tensor.is_nested or tensor.dim() != 4:
        raise NotImplementedError("query, key and value aren't all nested tensors [B,H,L,D]")
    sequences = [part.transpose(0, 1) for part in tensor.unbind()]
    lengths = [part.shape[0] for part in sequences]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=tensor.device)
    return torch.cat(sequences), starts, max(lengths, default=0)
