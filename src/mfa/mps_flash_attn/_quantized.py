"""Keys and values in 8 or 4 bits, with a scale per head, in mps-flash-attn's formats.

    FP8    the bits of torch.float8_e4m3fn or float8_e5m2, of x / scale; scale = max|x| / 448 or 57344
    INT8   128 + round(x / scale); scale = max|x| / 127
    NF4    the number of the nearest of 16 values (bitsandbytes) to x / scale, even columns in the low nibbles;
           scale = max|x|

Few queries read a cache of 8 bits as it is. Elsewhere `_CHUNK` keys at a time are expanded, by tables: torch has no FP8
arithmetic on MPS.
"""

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import embedding

from .._checks.tensors import check_is_tensor, dtype_name
from ..kv_cache import attention_with_kv_cache
from ._attention import attend_chunks, check_inputs, check_scale, visible, window_of

QUANT_FP8_E4M3 = 3
QUANT_FP8_E5M2 = 4
QUANT_INT8 = 5
QUANT_NF4 = 6

_FP8 = {QUANT_FP8_E4M3: torch.float8_e4m3fn, QUANT_FP8_E5M2: torch.float8_e5m2}
# Integers: torch.compile may make a symbol of a float that is no constant of a function, and then compiles twice.
_LARGEST = {QUANT_FP8_E4M3: 448, QUANT_FP8_E5M2: 57344, QUANT_INT8: 127, QUANT_NF4: 1}
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

    The query gets a gradient; keys, values and their scales are constants.
    """
    if quant_type not in (*_FP8, QUANT_INT8, QUANT_NF4):
        raise ValueError(f"quant_type is {quant_type}; it must be 3 (FP8_E4M3), 4 (FP8_E5M2), 5 (INT8) or 6 (NF4)")
    _check(query, key, value, k_scale, v_scale, quant_type)
    check_scale(scale, query.shape[3])
    length = key.shape[2]
    mask = visible(attn_mask, query, length)
    few = mask is None and query.shape[2] <= _FEW_QUERIES and quant_type in (QUANT_FP8_E4M3, QUANT_INT8)
    if few and not (torch.is_grad_enabled() and query.requires_grad):
        window = window_of(query.shape[2], length, is_causal, window_size)
        caches, scales = [], []
        for tensor, heads in ((key, k_scale), (value, v_scale)):
            signed = tensor.bitwise_xor(128).view(torch.int8) if quant_type == QUANT_INT8 else None
            caches.append(tensor.view(torch.float8_e4m3fn) if signed is None else signed)
            scales.append(heads.expand(tensor.shape[:2]).unsqueeze(-1).expand(tensor.shape[:3]))
        return attention_with_kv_cache(
            *(query, *caches),
            cache_seqlens=length,
            is_causal=False,
            scale=scale,
            window=window,
            key_scale=scales[0],
            value_scale=scales[1],
        )

    table = _values(quant_type).to(query.device)

    def load(keys: slice) -> tuple[Tensor, Tensor]:
        key_part, value_part = (
            (embedding(tensor[:, :, keys].int(), table).flatten(-2) * heads[..., None, None]).to(query.dtype)
            for tensor, heads in ((key, k_scale), (value, v_scale))
        )
        return key_part, value_part

    return attend_chunks(
        query, load, length, _CHUNK, is_causal=is_causal, scale=scale, mask=mask, window_size=window_size
    )


def _check(query: Tensor, key: Tensor, value: Tensor, k_scale: Tensor, v_scale: Tensor, kind: int) -> None:
    check_inputs(query, key, value)
    dim, what = (query.shape[3] // 2, "half of the") if kind == QUANT_NF4 else (query.shape[3], "the")
    if kind == QUANT_NF4 and query.shape[3] % 2 != 0:
        raise ValueError(f"query has head dimension {query.shape[3]}; it must be even for NF4")
    for name, tensor, heads in (("key", key, k_scale), ("value", value, v_scale)):
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be uint8")
        if tensor.shape[3] != dim and name == "key":
            raise ValueError(f"key has last dimension {tensor.shape[3]}; it must be {what} query's, {dim}")
        scale = "k_scale" if name == "key" else "v_scale"
        check_is_tensor(scale, heads)
        if heads.dtype != torch.float32:
            raise TypeError(f"{scale} has dtype {dtype_name(heads.dtype)}; it must be float32")
        if heads.device != query.device:
            raise ValueError(f"{scale} is on {heads.device}; it must be on the device of query, {query.device}")
        if tuple(heads.shape) not in (tuple(tensor.shape[:2]), tuple(tensor.shape[1:2])):
            raise ValueError(
                f"{scale} has shape {list(heads.shape)}; it must have shape [B,H] = {list(tensor.shape[:2])} or "
                f"[H] = {list(tensor.shape[1:2])} of {name}"
            )


def _quantize(key: Tensor, value: Tensor | None, kind: int) -> _Quantized | _Pair:
    if value is None:
        return _quantize_one("key", key, kind)
    (k, k_scale), (v, v_scale) = _quantize_one("key", key, kind), _quantize_one("value", value, kind)
    return k, v, k_scale, v_scale


def _quantize_one(name: str, tensor: Tensor, kind: int) -> _Pair:
    check_is_tensor(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be floating-point")
    if kind == QUANT_NF4 and tensor.shape[3] % 2 != 0:
        raise ValueError(f"{name} has head dimension {tensor.shape[3]}; it must be even for NF4")
    wide, largest = tensor.detach().float(), _LARGEST[kind]
    most = wide.abs().amax((2, 3)) if wide.numel() else wide.new_zeros(wide.shape[:2])
    scale = (most / largest).clamp_min(1e-12)
    scaled = wide / scale[..., None, None]
    if kind == QUANT_INT8:
        return (scaled.nan_to_num(0.0).clamp(-largest, largest).round() + 128).to(torch.uint8), scale
    bounds = _bounds(kind).to(tensor.device)
    if kind == QUANT_NF4:
        codes = torch.bucketize(scaled, bounds, out_int32=True)
        return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), scale
    codes = torch.bucketize(scaled.abs(), bounds, out_int32=True)
    return (codes | torch.signbit(scaled).int() << 7).to(torch.uint8), scale


def _nf4() -> Tensor:
    """The 16 quantiles of the normal distribution (Dettmers et al. 2023), float64."""
    quantiles = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    return torch.tensor(quantiles, dtype=torch.float64)


def _values(kind: int) -> Tensor:
    """What each byte means: float32 [256, numbers in a byte]."""
    codes = torch.arange(256)
    if kind in _FP8:
        return codes.to(torch.uint8).view(_FP8[kind]).float().unsqueeze(1)
    if kind == QUANT_INT8:
        return (codes - 128).float().unsqueeze(1)
    return _nf4().float()[torch.stack([codes & 15, codes >> 4], dim=1)]


def _bounds(kind: int) -> Tensor:
    """Where the codes of growing numbers change: code c is for numbers above bound c-1, up to bound c."""
    if kind == QUANT_NF4:
        values = _nf4()
        return ((values[1:] + values[:-1]) / 2).float()
    values = _values(kind)[:128, 0]
    values = values[values <= _LARGEST[kind]]  # not infinity and NaN
    middles = (values[1:] + values[:-1]) / 2
    odd = torch.arange(len(middles)) % 2 == 1  # a number in the middle goes to the even code
    return torch.where(odd, torch.nextafter(middles, torch.zeros(())), middles)
