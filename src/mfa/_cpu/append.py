"""Appending to a cache for CPU tensors, by PyTorch's operations. The Metal kernels give the same bits."""

import torch
from torch import Tensor

from .._arguments import Append
from ..quantize import quantize_kv
from .layout import laid_out


def attention_append(arguments: Append) -> tuple[Tensor, Tensor]:
    """`mfa::attention_append` for CPU tensors. The caller has checked the arguments and their contents.

    Returns:
        The rotated query, or without rotary a tensor of size 0; and the lengths with what was appended, int32 [B].
    """
    query, key, lengths = arguments.query, arguments.key, arguments.cache_lengths
    if lengths is None:
        lengths = torch.full((query.shape[0],), arguments.cache_length, dtype=torch.int32)
    new = key.shape[2]
    rotated_query = query.new_empty(0)
    cos, sin = arguments.rotary_cos, arguments.rotary_sin
    if cos is not None and sin is not None:
        starts = lengths if arguments.rotary_seqlens is None else arguments.rotary_seqlens
        own, advance = torch.arange(new), torch.arange(query.shape[2])
        if not arguments.queries_advance:
            advance = torch.zeros_like(advance)
        tables = (cos, sin, arguments.rotary_interleaved)
        rotated_query = laid_out(_rotated(query, starts[:, None] + advance, *tables), query)
        key = _rotated(key, starts[:, None] + own, *tables)
    if new > 0:
        entries, slots = _places(arguments, lengths)
        for cache, scales, rows in (
            (arguments.key_cache, arguments.key_scale, key),
            (arguments.value_cache, arguments.value_scale, arguments.value),
        ):
            if scales is not None:
                rows, row_scales = quantize_kv(rows, cache.dtype)
                _store(scales, entries, slots, row_scales)
            _store(cache, entries, slots, rows)
    return rotated_query, lengths + new


def _rotated(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Of x [B,H,L,D] whose tokens have the positions [B,L]: in float32 (float64 for float64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cosines, sines = (table[positions.long()].to(wide).unsqueeze(1) for table in (cos, sin))  # of all heads
    dim = 2 * cos.shape[1]
    sizes, pair = ((dim // 2, 2), -1) if interleaved else ((2, dim // 2), -2)
    first, second = x[..., :dim].unflatten(-1, sizes).to(wide).unbind(pair)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.cat((torch.stack(turned, pair).flatten(-2).to(x.dtype), x[..., dim:]), -1)


def _places(arguments: Append, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where new tokens go: index in the cache's first dimension, and slot there, int64 that broadcast to [B,Lnew]."""
    tokens = lengths.long().unsqueeze(1) + torch.arange(arguments.key.shape[2])
    if arguments.block_table is None:
        return torch.arange(tokens.shape[0]).unsqueeze(1), tokens
    page = arguments.key_cache.shape[2]
    return arguments.block_table.long().gather(1, tokens.div(page, rounding_mode="floor")), tokens.remainder(page)


def _store(cache: Tensor, entries: Tensor, slots: Tensor, rows: Tensor) -> None:
    """cache[entries, :, slots] = rows.

    Args:
        cache: [B or pages,Hkv,tokens,D], or without D; modified.
        entries, slots: int64, broadcastable to [B,Lnew], within the cache.
        rows: [B,Hkv,Lnew,D], or without D, of the cache's dtype.
    """
    if cache.dtype.itemsize == 1:  # few index operations know 8-bit floats
        cache, rows = cache.view(torch.uint8), rows.view(torch.uint8)
    cache[entries, :, slots] = rows.transpose(1, 2)
