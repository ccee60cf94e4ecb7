"""Attention over a cache for CPU tensors: `forward.py` on the live keys and values of each batch entry.

    for each run of batch entries of the same length (paged: for each entry):
        keys, values <- the live part of the cache, its pages gathered, in floating point
        out, lse <- attention

What lies behind the live length is never looked at, nor are the pages that no live token needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks.cache import QUANTIZED_DTYPES
from . import forward
from .layout import empty_outputs


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`mfa::attention_decode` for CPU tensors. The caller has checked the arguments and their contents.

    Args:
        query: [B,Hq,Lq,D]; float16, bfloat16, float32 or float64.
        key_cache, value_cache: [B,Hkv,Lmax,D|Dv], or pages [pages,Hkv,page,D|Dv]; of the query's dtype, int8 or
            float8_e4m3fn.
        cache_lengths: int32 [B], live tokens. block_table: int32 [B,pages per sequence] of a paged cache.
        key_scale, value_scale: float32, a quantized cache's shape without its last dimension.
        sinks: [Hq]. alibi_slopes: [Hq] or [B,Hq].
        window_left, window_right: relative to the lower-right diagonal of the live part, None = open.

    Returns:
        out [B,Hq,Lq,Dv], strided as `empty_outputs` says, and lse float32 [B,Hq,Lq].
    """
    out, lse = empty_outputs(query, value_cache.shape[3])
    dtype = torch.promote_types(query.dtype, torch.float32)
    for entries, length in _runs(cache_lengths.tolist(), together=block_table is None):
        keys, values = (
            _live(cache, scales, block_table, entries, length, dtype)
            for cache, scales in ((key_cache, key_scale), (value_cache, value_scale))
        )
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[entries]
        out[entries], lse[entries] = forward.attention_forward(
            query[entries],
            keys,
            values,
            None,
            sinks,
            slopes,
            scale,
            window_left,
            window_right,
            softcap,
            trains=False,
        )
    return out, lse


def _runs(lengths: list[int], together: bool) -> Iterator[tuple[slice, int]]:
    """Ranges of batch entries that have the same length; of one entry each if not `together`."""
    first = 0
    for entry in range(1, len(lengths) + 1):
        if entry == len(lengths) or not together or lengths[entry] != lengths[first]:
            yield slice(first, entry), lengths[first]
            first = entry


def _live(
    cache: Tensor, scales: Tensor | None, block_table: Tensor | None, entries: slice, length: int, dtype: torch.dtype
) -> Tensor:
    """[B,Hkv,length,D] of these entries, in the cache's dtype, or in `dtype` if it is quantized."""
    rows = _rows(cache, block_table, entries, length)
    if cache.dtype not in QUANTIZED_DTYPES or scales is None:
        return rows
    return rows.to(dtype) * _rows(scales, block_table, entries, length).unsqueeze(-1)


def _rows(cache: Tensor, block_table: Tensor | None, entries: slice, length: int) -> Tensor:
    """The first `length` tokens; the cache is [B or pages,Hkv,tokens] or has one more dimension."""
    if block_table is None:
        return cache[entries, :, :length]
    page = cache.shape[2]
    pages = block_table[entries.start, : -(-length // page)].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].unsqueeze(0)
