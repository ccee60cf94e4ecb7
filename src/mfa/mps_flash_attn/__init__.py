"""The interface of mps-flash-attn 0.6.3 (https://github.com/mpsops/mps-flash-attention) over mfa's kernels.

Code written for it changes its import line only. Tensors are [B,H,N,D], on `mps` or, unlike there, `cpu`. Conventions:

    attn_mask     True = masked
    attn_bias     softmax((Q K' + bias) * scale) V: the bias is scaled too
    is_causal     query i sees key j iff j <= i, for any two lengths
    window_size   query i sees key j only if j >= i - window_size; 0 = off

Beyond it: gradients of the bias, and through the chunked and quantized functions; a floating-point mask is added to
the scaled scores, as SDPA does it; `replace_sdpa` can be undone. Its low-level ops `torch.ops.mfa.forward` ... are not
here: they are that package's own, and both can be imported. Of the environment, MFA_MIN_SEQ and MFA_DEBUG=1 (logs each
call of SDPA) are read; MFA_BRIDGE_PATH isn't needed.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from .. import pipelines, sdpa
from .._log import LOG
from ..device import is_available
from ._attention import convert_mask, flash_attention, flash_attention_chunked, flash_attention_with_bias
from ._quantized import (
    QUANT_FP8_E4M3,
    QUANT_FP8_E5M2,
    QUANT_INT8,
    QUANT_NF4,
    flash_attention_fp8,
    flash_attention_int8,
    flash_attention_nf4,
    flash_attention_quantized,
    quantize_kv_fp8,
    quantize_kv_int8,
    quantize_kv_nf4,
)

if TYPE_CHECKING:
    from . import benchmark as benchmark

__version__ = "0.6.3"  # of the interface

__all__ = [
    "QUANT_FP8_E4M3",
    "QUANT_FP8_E5M2",
    "QUANT_INT8",
    "QUANT_NF4",
    "__version__",
    "clear_cache",
    "convert_mask",
    "flash_attention",
    "flash_attention_chunked",
    "flash_attention_fp8",
    "flash_attention_int8",
    "flash_attention_nf4",
    "flash_attention_quantized",
    "flash_attention_with_bias",
    "is_available",
    "precompile",
    "quantize_kv_fp8",
    "quantize_kv_int8",
    "quantize_kv_nf4",
    "register_custom_op",
    "replace_sdpa",
]

if os.environ.get("MFA_DEBUG") == "1":
    LOG.setLevel(logging.DEBUG)
    if not LOG.hasHandlers():
        LOG.addHandler(logging.StreamHandler())


def replace_sdpa(*, cpu: bool = False) -> sdpa.Handle:
    """Routes `F.scaled_dot_product_attention` of `mps` tensors to mfa, also where it was imported by name before.

    Of queries from MFA_MIN_SEQ tokens on (an environment variable; 32). Masks keep SDPA's meaning, floating-point ones
    included; key heads that divide the query's need no `enable_gqa`. `cpu`: CPU tensors too, which otherwise are taken
    inside `mfa.simulate()` only. What can't be taken goes to ATen, with the reason logged once.

    Returns a handle; its `remove()` undoes the replacement, as does `mfa.sdpa.disable()`.
    """
    shortest = int(os.environ.get("MFA_MIN_SEQ", "32"))
    return sdpa.activate(sdpa.Options(cpu=cpu, min_query_length=shortest, repeat_heads=True))


def precompile() -> None:
    """Builds the kernels of the usual head dimensions, forward and backward, and archives them on disk.

    Kernels are compiled in the package already and serve every length; this makes Metal's pipelines of them. Raises
    RuntimeError where the Metal kernels can't run.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (32, 48, 64, 80, 96, 128):
            for is_causal in (False, True):
                pipelines.precompile(head_dim, dtype=dtype, is_causal=is_causal, training=True)


def clear_cache() -> None:
    """Forgets the pipelines, in memory and on disk."""
    pipelines.clear_cache()


def register_custom_op() -> bool:
    """Whether the ops are registered, which importing the package does: torch.compile needs nothing more."""
    return hasattr(torch.ops.mfa, "attention_forward")


def __getattr__(name: str) -> Any:
    if name == "benchmark":
        return importlib.import_module(".benchmark", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
