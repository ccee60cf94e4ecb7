"""Keys and values in 8 or 4 bits, with a scale per head, in mps-flash-attn's formats. For inference: no gradients.

    FP8    the bits of torch.float8_e4m3fn or float8_e5m2, of x / scale; scale = max|x| / 448 or 57344
    INT8   128 + round(x / scale); scale = max|x| / 127
    NF4    the number of the nearest of 16 values (bitsandbytes) to x / scale, even columns in the low nibbles;
           scale = max|x|

Few queries read a cache of 8 bits as it is; more of them, and NF4, expand `_CHUNK` keys at a time.
"""

import math
from typing import overload

import torch
from torch import Tensor

from .. import _checks
from ..kv_cache import attention_with_kv_cache
from ._attention import attend_chunks, check_scale, visible, window_of

QUANT_FP8_E4M3 = 3
QUANT_FP8_E5M2 = 4
QUANT_INT8 = 5
QUANT_NF4 = 6

_FP8 = {QUANT_FP8_E4M3: torch.float8_e4m3fn, QUANT_FP8_E5M2: torch.float8_e5m2}
# Quantiles of the normal distribution (Dettmers et al. 2023).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_CHUNK = 16384
_FEW_QUERIES = 16

_Pair = tuple[Tensor, Tensor]
_Quantized = tuple[Tensor, Tensor, Tensor, Tensor]


@overload
def quantize_kv_fp8(key: Tensor, value: Tensor, use_e5m2: bool = False) -> _Quantized: ...


@overload
def quantize_kv_fp8(key: Tensor, value: None = None, use_e5m2: bool = False) -> _Pair: ...


def quantize_kv_fp8(key: Tensor, value: Tensor | None = None, use_e5m2: bool = False) -> _Quantized | _Pair:
    """Keys and values as FP8: (key, value, k_scale, v_scale), uint8 [B,H,N,D] and float32 [B,H].

    Of one tensor alone: (quantized, scale), as the package's README calls it.
    """
    return _quantize(key, value, QUANT_FP8_E5M2 if use_e5m2 else QUANT_FP8_E4M3)


@overload
def quantize_kv_int8(key: Tensor, value: Tensor) -> _Quantized: ...


@overload
def quantize_kv_int8(key: Tensor, value: None = None) -> _Pair: ...


def quantize_kv_int8(key: Tensor, value: Tensor | None = None) -> _Quantized | _Pair:
    """Keys and values as INT8, centred at 128; shapes as in `quantize_kv_fp8`."""
    return _quantize(key, value, QUANT_INT8)


@overload
def quantize_kv_nf4(key: Tensor, value: Tensor) -> _Quantized: ...


@overload
def quantize_kv_nf4(key: Tensor, value: None = None) -> _Pair: ...


def quantize_kv_nf4(key: Tensor, value: Tensor | None = None) -> _Quantized | _Pair:
    """Keys and values as NF4, two numbers in a byte: uint8 [B,H,N,D/2]. D must be even."""
    return _quantize(key, value, QUANT_NF4)


def flash_attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    window_size: int = 0,
    use_e5m2: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` over what `quantize_kv_fp8` returned."""
    kind = QUANT_FP8_E5M2 if use_e5m2 else QUANT_FP8_E4M3
    return flash_attention_quantized(
        query, key, value, k_scale, v_scale, kind, is_causal, attn_mask, window_size, scale
    )


def flash_attention_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    window_size: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` over what `quantize_kv_int8` returned."""
    return flash_attention_quantized(
        query, key, value, k_scale, v_scale, QUANT_INT8, is_causal, attn_mask, window_size, scale
    )


def flash_attention_nf4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    window_size: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` over what `quantize_kv_nf4` returned."""
    return flash_attention_quantized(
        query, key, value, k_scale, v_scale, QUANT_NF4, is_causal, attn_mask, window_size, scale
    )


def flash_attention_quantized(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    quant_type: int,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    window_size: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` over quantized keys and values.

    Args:
        query: [B,Hq,Nq,D], floating point.
        key, value: uint8 [B,Hkv,Nk,D], or [B,Hkv,Nk,D/2] for NF4; Hq is a multiple of Hkv.
        k_scale, v_scale: float32 [B,Hkv] or [Hkv].
        quant_type: QUANT_FP8_E4M3, QUANT_FP8_E5M2, QUANT_INT8 or QUANT_NF4.
        is_causal, attn_mask, window_size, scale: as in `flash_attention`.
    """
    if quant_type not in (*_FP8, QUANT_INT8, QUANT_NF4):
        raise ValueError(f"quant_type is {quant_type}; it must be 3 (FP8_E4M3), 4 (FP8_E5M2), 5 (INT8) or 6 (NF4)")
    _check(query, key, value, k_scale, v_scale, quant_type)
    check_scale(scale, query.shape[3])
    mask, length = visible(attn_mask), key.shape[2]
    if torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            "query requires grad, and attention over quantized keys has no gradients: call under torch.no_grad()"
        )
    if mask is None and quant_type in (QUANT_FP8_E4M3, QUANT_INT8) and query.shape[2] <= _FEW_QUERIES:
        tensors = (key, value) if quant_type == QUANT_INT8 else ()
        key, value = (tensor.bitwise_xor(128).view(torch.int8) for tensor in tensors) if tensors else (
            tensor.view(torch.float8_e4m3fn) for tensor in (key, value)
        )
        scales = (scale_of.expand(key.shape[:2]).unsqueeze(-1).expand(key.shape[:3]) for scale_of in (k_scale, v_scale))
        key_scale, value_scale = scales
        return attention_with_kv_cache(
            query,
            key,
            value,
            cache_seqlens=length,
            is_causal=False,
            scale=scale,
            window=window_of(query.shape[2], 0, length, is_causal, window_size),
            key_scale=key_scale,
            value_scale=value_scale,
        )

    def load(keys: slice) -> tuple[Tensor, Tensor]:
        return (
            _expand(key[:, :, keys], k_scale, quant_type, query.dtype),
            _expand(value[:, :, keys], v_scale, quant_type, query.dtype),
        )

    terms = {"is_causal": is_causal, "scale": scale, "mask": mask, "window_size": window_size}
    return attend_chunks(query, load, length, _CHUNK, **terms)  # type: ignore[arg-type]
