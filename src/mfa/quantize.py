"""8-bit keys and values with a scale per token, for `mfa.attention_with_kv_cache`."""

import torch
from torch import Tensor

from ._checks.cache import QUANTIZED_DTYPES
from ._checks.tensors import DTYPES, check_is_tensor, dtype_name, listed


def quantize_kv(tensor: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Keys or values in 8 bits: `tensor` is about `quantized.float() * scale[..., None]`.

    Symmetric, with a scale for each token of each head: its largest absolute value becomes 127 (int8), 448
    (float8_e4m3fn) or 57344 (float8_e5m2). int8 is the most exact of them where a token's numbers are of like size. An
    infinity or NaN makes its own token NaN, and no other.

    Args:
        tensor: [...,D], floating point.
        dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
        quantized [...,D] of `dtype`, and scale [...], float32.

    Raises:
        TypeError: another dtype of either.
    """
    check_is_tensor("tensor", tensor)
    if tensor.dtype not in DTYPES:
        names = ", ".join(map(dtype_name, DTYPES))
        raise TypeError(f"tensor has dtype {dtype_name(tensor.dtype)}; it must be one of {names}")
    if dtype not in QUANTIZED_DTYPES:
        names = listed(tuple(map(dtype_name, QUANTIZED_DTYPES)))
        raise TypeError(f"dtype is {dtype}; it must be {names}")
    # Not a constant of the module: torch.compile may make a symbol of a float there, and then compiles twice.
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    wide = tensor.to(torch.float32)
    # A normal number even for a token of zeros or of the smallest ones, which a GPU may round to 0.
    scale = (wide.abs().amax(-1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = wide / scale.unsqueeze(-1)
    if dtype == torch.int8:
        scaled = scaled.round().nan_to_num(0.0, 0.0, 0.0)  # the scale tells; casting a NaN is undefined
    return scaled.clamp(-largest, largest).to(dtype), scale
