"""Attention functions of this and of other packages, as far as they are installed: one call for all of them.

Each takes query, key, value [B,H,L,D] (fewer heads in key and value allowed) and `is_causal`, and returns [B,H,L,D].
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import attention

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _mfa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return attention(query, key, value, is_causal=is_causal, enable_gqa=True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=grouped)


def _math(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """What torch does where it has no fused kernel: the scores as a matrix."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    out: Tensor = scores.softmax(-1) @ value
    return out


def _mps_flash_attn() -> Attention:
    module: Any = importlib.import_module("mps_flash_attn")

    def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        out: Tensor = module.flash_attention(query, key, value, is_causal=is_causal)
        return out

    return call


def _mtlattn() -> Attention:
    module: Any = importlib.import_module("mtlattn")

    def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        out: Tensor = module.flash_attn(query, key, value, causal=is_causal)
        return out

    return call


def _metal_flash_attn() -> Attention:
    module: Any = importlib.import_module("metal_flash_attn")

    def call(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        transposed = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out: Tensor = module.flash_attn_func(*transposed, causal=is_causal)
        return out.transpose(1, 2)

    return call


# Name of the module -> how to call it. What can't run a problem raises, and its place in the table says so.
_OTHERS: dict[str, Callable[[], Attention]] = {
    "mps_flash_attn": _mps_flash_attn,
    "mtlattn": _mtlattn,
    "metal_flash_attn": _metal_flash_attn,
}


def installed() -> dict[str, Attention]:
    """By name, ours first. MLX is no torch package: see `mlx_attention`."""
    found: dict[str, Attention] = {"mfa": _mfa, "sdpa": _sdpa, "math": _math}
    for name, make in _OTHERS.items():
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = make()
            except ImportError:  # made for another torch or another system
                continue
    return found


def mlx_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Callable[[], object] | None:
    """A call of MLX's attention on arrays of its own with the same numbers, or None without MLX. Forward only."""
    if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx.core") is None:
        return None
    mx: Any = importlib.import_module("mlx.core")
    dtype = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}[query.dtype]
    arrays = [mx.array(tensor.detach().float().cpu().numpy()).astype(dtype) for tensor in (query, key, value)]
    mask = "causal" if is_causal else None

    def call() -> object:
        out = mx.fast.scaled_dot_product_attention(*arrays, scale=query.shape[-1] ** -0.5, mask=mask)
        mx.eval(out)
        return out

    return call
