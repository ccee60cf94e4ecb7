"""The packed form of each BlockMask, for as long as that lives."""

import weakref
from typing import Any

import torch

from .block_mask import PackedBlockMask, pack_block_mask

_remembered: weakref.WeakKeyDictionary[Any, PackedBlockMask] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _remember(block_mask: Any) -> None:
    """While torch.compile traces, this runs on the mask itself: what it holds says how large the packed mask is."""
    if block_mask not in _remembered:
        _remembered[block_mask] = pack_block_mask(block_mask)


def remembered(block_mask: Any) -> PackedBlockMask:
    """What `pack_block_mask` makes of it, once."""
    _remember(block_mask)
    return _remembered[block_mask]
