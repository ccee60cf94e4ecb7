"""flash_attention and its variants: arguments in mps-flash-attn's conventions become those of mfa.attention."""

import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _log
from .._checks.dense import check_bias
from .._checks.tensors import check_is_tensor
from ..attention import attention
from ..merge import merge_attention


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int = 0,
    bf16_backward: bool = False,
) -> Tensor:
    """softmax(scale * Q K' + mask) V, with gradients.

    Args:
        query: [B,Hq,Nq,D]. key, value: [B,Hkv,Nk,D]; Hq is a multiple of Hkv.
        is_causal: query i sees key j iff j <= i.
        scale: above 0; None is 1/sqrt(D).
        attn_mask: (Nq,Nk), (B,Nq,Nk) or (B,H,Nq,Nk), each size may be 1. bool or uint8: True = masked. Floating point:
            added to the scaled scores.
        window_size: query i sees key j only if j >= i - window_size; 0 = off.
        bf16_backward: there, speed for accuracy. Without effect here: there is one backward pass, and it has both.
    """
    if bf16_backward:
        _log.once("bf16_backward has no effect: gradients always come from sums in float32", logging.INFO)
    check_inputs(query, key, value)
    check_scale(scale, query.shape[3])
    return attend(query, key, value, is_causal, scale, visible(attn_mask, query, key.shape[2]), window_size)


def flash_attention_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: int = 0,
    bias_repeat_count: int = 0,
) -> Tensor:
    """softmax((Q K' + bias) * scale) V, with gradients, that of the bias included.

    A bias of SDPA, which is added to the scaled scores, has to be divided by the scale.

    Args:
        query, key, value, is_causal, scale, window_size: as in `flash_attention`.
        attn_bias: (B,H,Nq,Nk) or (H,Nq,Nk), each size may be 1; float32 or the query's dtype.
        bias_repeat_count: n > 0: batch entry b uses attn_bias[b % n] (windows of Swin); attn_bias has n or 1 entries.
    """
    check_inputs(query, key, value)
    check_scale(scale, query.shape[3])
    check_is_tensor("attn_bias", attn_bias)
    if attn_bias.dim() not in (3, 4):
        raise ValueError(f"attn_bias has {attn_bias.dim()} dimensions; it must have 3 or 4")
    if attn_bias.dtype == torch.bool:
        raise TypeError("attn_bias has dtype bool; it must be floating-point: pass it to flash_attention as attn_mask")
    if bias_repeat_count < 0:
        raise ValueError(f"bias_repeat_count is {bias_repeat_count}; it must be 0 (off) or more")
    bias = attn_bias if attn_bias.dim() == 4 else attn_bias.unsqueeze(0)
    repeats = bias_repeat_count if bias.shape[0] != 1 else 0
    if repeats and bias.shape[0] != repeats:
        raise ValueError(f"attn_bias has batch size {bias.shape[0]}; it must be 1 or bias_repeat_count, {repeats}")
    check_bias("attn_bias", bias[:1] if repeats else bias, query, key)
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    # In the dtype of the scores: rounding the product to 16 bits would add an error to that of the bias.
    bias = bias.to(torch.promote_types(query.dtype, torch.float32)) * factor
    if repeats == 0:
        return attend(query, key, value, is_causal, scale, bias, window_size)
    batch = query.shape[0]
    if batch % repeats != 0:
        index = torch.arange(batch, device=bias.device) % repeats
        return attend(query, key, value, is_causal, scale, bias[index], window_size)
    # Entries that differ in their bias become heads, and those that share one the batch: nothing is repeated.
    query, key, value = (tensor.unflatten(0, (-1, repeats)).flatten(1, 2) for tensor in (query, key, value))
    bias = bias.expand(-1, query.shape[1] // repeats, -1, -1).flatten(0, 1)
    out = attend(query, key, value, is_causal, scale, bias, window_size)
    return torch.flatten(out.unflatten(1, (repeats, -1)), 0, 1)


def flash_attention_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_size: int = 16384,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` in one launch per `chunk_size` keys, so that none takes long; in float32 between them.

    Memory doesn't need it: no function here has a matrix of scores.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be 1 or more")
    check_inputs(query, key, value)
    check_scale(scale, query.shape[3])
    return attend_chunks(
        query,
        lambda keys: (key[:, :, keys], value[:, :, keys]),
        key.shape[2],
        chunk_size,
        is_causal=is_causal,
        scale=scale,
        mask=None,
        window_size=0,
    )


def convert_mask(attn_mask: Tensor | None) -> Tensor | None:
    """A mask as `flash_attention` takes it: None and bool as they are; of a floating-point one, what is <= -1000.

    Smaller biases are lost by it; `flash_attention` takes a floating-point mask itself.
    """
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask
    return attn_mask <= -1e3


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None,
    window_size: int,
) -> Tensor:
    """mfa.attention, of any number of key heads that divides the query's. `mask` in SDPA's conventions."""
    window = window_of(query.shape[2], key.shape[2], is_causal, window_size)
    return attention(query, key, value, mask, scale=scale, enable_gqa=True, window=window)


def attend_chunks(
    query: Tensor,
    load: Callable[[slice], tuple[Tensor, Tensor]],
    length: int,
    chunk: int,
    *,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None,
    window_size: int,
) -> Tensor:
    """`attend` for keys and values that `load` gives, `chunk` of `length` at a time."""
    total: tuple[Tensor, Tensor] | None = None
    seen = min(length, query.shape[2]) if is_causal else length  # keys behind the last query's are hidden
    for start in range(0, max(seen, 1), chunk):
        keys = slice(start, min(start + chunk, length))
        key, value = load(keys)
        part = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
        window = window_of(query.shape[2], keys.stop, is_causal, window_size)
        if total is None and keys.stop >= seen:
            return attention(query, key, value, part, scale=scale, enable_gqa=True, window=window)
        out, lse = attention(query, key, value, part, scale=scale, enable_gqa=True, window=window, return_lse=True)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        total = (out, lse) if total is None else merge_attention(*total, out, lse)
    assert total is not None
    return total[0].to(query.dtype)


def window_of(queries: int, stop: int, is_causal: bool, window_size: int) -> tuple[int | None, int | None]:
    """For keys up to `stop`: the window, aligned to their lower right, that is one aligned to the upper left of all."""
    if window_size < 0:
        raise ValueError(f"window_size is {window_size}; it must be 0 (off) or more")
    return (window_size + stop - queries if window_size else None), (queries - stop if is_causal else None)


def visible(attn_mask: Tensor | None, query: Tensor, length: int) -> Tensor | None:
    """SDPA's mask of four dimensions (True = attend) for one of ours, and `length` keys."""
    if attn_mask is None:
        return None
    check_is_tensor("attn_mask", attn_mask)
    mask = attn_mask.unsqueeze(1) if attn_mask.dim() == 3 else attn_mask
    whole = (*query.shape[:3], length)
    sizes = zip(reversed(mask.shape), reversed(whole), strict=False)
    if mask.dim() not in (2, 4) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"attn_mask shape mismatch: it is {list(attn_mask.shape)}; it must be 4D (B, H, Nq, Nk), 3D (B, Nq, Nk) or "
            f"2D (Nq, Nk), of {list(whole)}, and each size may be 1"
        )
    if mask.dtype == torch.bool:
        return ~mask
    return mask == 0 if mask.dtype == torch.uint8 else mask


# Exceptions and first words of messages are that package's: its tests, and code that is written for it, match them.


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
        if tensor.dim() != 4:
            raise RuntimeError(f"{name} must be 4D (B, H, N, D); it has {tensor.dim()} dimensions")


def check_scale(scale: float | None, head_dim: int) -> None:
    if scale is None:
        return
    if not scale > 0:
        raise ValueError(f"scale must be positive; it is {scale}")
    usual = 1 / math.sqrt(head_dim)
    if not usual / 100 <= scale <= usual * 100:
        warnings.warn(f"scale={scale:.6g} is very different from default {usual:.6g}", UserWarning, stacklevel=3)
