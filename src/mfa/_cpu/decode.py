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
    lengths = arguments.cache_lengths.tolist()
    starts = [0] * len(lengths) if arguments.cache_leftpad is None else arguments.cache_leftpad.tolist()
    for entries, live in _runs(starts, lengths, together=table is None):
        out[entries], lse[entries] = attention_forward(
            Dense(
                query=query[entries],
                key=live_rows(arguments.key_cache, arguments.key_scale, table, entries, live, dtype),
                value=live_rows(arguments.value_cache, arguments.value_scale, table, entries, live, dtype),
                bias=_mask(arguments.attn_mask, entries, len(live)),
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


def _runs(starts: list[int], lengths: list[int], together: bool) -> Iterator[tuple[slice, range]]:
    """Ranges of batch entries that have the same live slots; of one entry each if not `together`."""
    live, first = [range(*ends) for ends in zip(starts, lengths, strict=True)], 0
    for entry in range(1, len(live) + 1):
        if entry == len(live) or not together or live[entry] != live[first]:
            yield slice(first, entry), live[first]
            first = entry


def _mask(mask: Tensor | None, entries: slice, keys: int) -> Tensor | None:
    """Of these entries, over all of their live keys: those before the mask's are open."""
    if mask is None:
        return None
    mask = mask if mask.shape[0] == 1 else mask[entries]
    return torch.nn.functional.pad(mask, (keys - mask.shape[3], 0), value=True)


def live_rows(
    cache: Tensor, scales: Tensor | None, block_table: Tensor | None, entries: slice, live: range, dtype: torch.dtype
) -> Tensor:
    """[B,Hkv,live,D] of these entries, in the cache's dtype, or in `dtype` if it is quantized."""
    rows = _rows(cache, block_table, entries, live)
    if cache.dtype not in QUANTIZED_DTYPES or scales is None:
        return rows
    return rows.to(dtype) * _rows(scales, block_table, entries, live).unsqueeze(-1)


def _rows(cache: Tensor, block_table: Tensor | None, entries: slice, live: range) -> Tensor:
    """The live slots; the cache is [B or pages,Hkv,tokens] or has one more dimension."""
    if block_table is None:
        return cache[entries, :, live.start : live.stop]
    page = cache.shape[2]
    pages = block_table[entries.start, : -(-live.stop // max(page, 1))].long()
    return cache[pages].transpose(0, 1).flatten(1, 2)[:, live.start : live.stop].unsqueeze(0)
