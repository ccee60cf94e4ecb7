"""Modules of mfa that need torch alone: where the kernels run, the package may not be there."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[2] / "src/mfa"


@functools.lru_cache
def load(path: str) -> ModuleType:
    """src/mfa/PATH by itself."""
    spec = importlib.util.spec_from_file_location("mfa_" + Path(path).stem, PACKAGE / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.lru_cache
def block_mask(queries: int, keys: int) -> Any:
    """A packed block mask, the same on every machine: a third of its blocks hidden, seen whole, and seen in part."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kind = (q_idx // 128 + kv_idx // 128) % 3
        return (kind == 0) | ((kind == 1) & ((q_idx * 7 + kv_idx * 3) % 5 < 2))

    with torch.device("cpu"):
        return load("block_mask.py").pack_block_mask(create_block_mask(mask, None, None, queries, keys, device="cpu"))
