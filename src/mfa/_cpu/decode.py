"""Attention over a cache for CPU tensors: `forward.py` on the live keys and values of each batch entry.

    for each run of batch entries of the same length (paged: for each entry):
        keys, values <- the live part of the cache, its pages gathered, in floating point
        out, lse <- attention

What lies behind the live length is never looked at, nor are the pages that no live token needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._arguments import Decode, Dense
from .._checks.cache import QUANTIZED_DTYPES
from .forward import attention_forward
from .layout import empty_outputs


def attention_decode(arguments: Decode) -> tuple[Tensor, Tensor]:
    """`mfa::attention_decode` for CPU tensors. The caller has checked the arguments and their contents.

    Returns:
        out [B,Hq,Lq,Dv], strided as `empty_outputs` says, and lse float32 [B,Hq,Lq].
    """
    query, slopes, table = arguments.query, arguments.alibi_slopes, arguments.block_table
    out, lse = empty_outputs(query, arguments.value_cache.shape[3])
    dtype = torch.promote_types(query.dtype, torch.float32)
    for entries, length in _runs(arguments.cache_lengths.tolist(), together=table is None):
        out[entries], lse[entries] = attention_forward(
            Dense(
                query=query[entries],
                key=_live(arguments.key_cache, arguments.key_scale, table, entries, length, dtype),
                value=_live(arguments.value_cache, arguments.value_scale, table, entries, length, dtype),
                bias=None,
                sinks=arguments.sinks,
                alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[entries],
                scale=arguments.scale,
                window_left=arguments.window_left,
                window_right=arguments.window_right,
                softcap=arguments.softcap,
            ),
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
