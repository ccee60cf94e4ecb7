"""float64 and the bits of narrower formats, by numpy alone."""

from __future__ import annotations

import numpy as np


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 -> the bits of the format; bfloat as uint16, rounded to nearest even."""
    if dtype == "bf16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.float16 if dtype == "f16" else np.float32)


def decode(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)
