"""Blocks of a packed block mask, for the CPU implementation: rows, and the blocks of keys that they see."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..block_mask import BLOCK, Lists
from .blocks import HIDDEN, Cut, Window


@dataclass(frozen=True)
class Listed:
    """What `blocks.Band` is for windows: one block of rows, whose keys don't lie next to each other."""

    rows: slice
    spans: tuple[slice, ...]  # of keys
    hidden: Tensor | None  # bool [rows,keys], what the mask hides; None if nothing

    def of_rows(self, tensor: Tensor) -> Tensor:
        return tensor[:, :, self.rows]

    def of_keys(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :, span] for span in self.spans], 2)

    def add_to_keys(self, target: Tensor, summand: Tensor) -> None:
        for span, part in zip(self.spans, summand.split(self.widths, 2), strict=True):
            target[:, :, span] += part

    @property
    def widths(self) -> list[int]:
        return [span.stop - span.start for span in self.spans]

    def added(self, masks: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """What is added to scores: `masks`, of each span, and this one."""
        rows = self.rows.stop - self.rows.start
        total = None
        if any(mask is not None for mask in masks):
            lead = next(mask.shape[:-2] for mask in masks if mask is not None)
            parts = [
                torch.zeros((*lead, rows, width), dtype=dtype) if mask is None else mask.expand(*lead, rows, width)
                for mask, width in zip(masks, self.widths, strict=True)
            ]
            total = torch.cat(parts, -1)
        if self.hidden is None:
            return total
        if total is None:
            total = torch.zeros(self.hidden.shape, dtype=dtype)
        return total.masked_fill(self.hidden, HIDDEN)


class ListedMask:
    """The blocks of every batch entry and head."""

    def __init__(self, data: Tensor, window: Window) -> None:
        lists = Lists.of(data)
        self.batch, self.heads = lists.header["batch"], lists.header["heads"]
        self._blocks: dict[tuple[int, int], list[Listed]] = {}
        for b, h, i, entries in lists.rows():
            rows = slice(i * BLOCK, min((i + 1) * BLOCK, window.query_length))
            block = _listed(lists, entries.tolist(), rows, window)
            if block is not None:
                self._blocks.setdefault((b, h), []).append(block)

    def blocks(self, batches: slice, heads: slice) -> list[Listed]:
        """Of batch entries and query heads that share a mask."""
        return self._blocks.get((batches.start if self.batch > 1 else 0, heads.start if self.heads > 1 else 0), [])

    def cut(self, cut: Cut) -> Cut:
        """Whose chunks have one mask per query head of a group."""
        batches, heads = 1 if self.batch > 1 else cut.batches, 1 if self.heads > 1 else cut.heads
        return replace(cut, batches=batches, heads=heads)

    def chunks(self, cut: Cut) -> Iterator[tuple[slice, slice, slice, list[Listed]]]:
        """Ranges of batches, of key heads and of their query heads that share a mask; and the blocks of these."""
        for batches, key_heads, query_heads in self.cut(cut).chunks():
            shared = [query_heads]
            if self.heads > 1:
                shared = [slice(head, head + 1) for head in range(query_heads.start, query_heads.stop)]
            for heads in shared:
                yield batches, key_heads, heads, self.blocks(batches, heads)


def _listed(lists: Lists, entries: list[list[int]], rows: slice, window: Window) -> Listed | None:
    seen = slice(rows.start + window.shift - window.left, rows.stop + window.shift + window.right)
    spans: list[slice] = []
    hidden: list[Tensor] = []
    for _, key_block, number, *_ in entries:
        span = slice(key_block * BLOCK, min((key_block + 1) * BLOCK, window.key_length))
        if span.start >= seen.stop or span.stop <= seen.start:
            continue
        spans.append(span)
        shape = (rows.stop - rows.start, span.stop - span.start)
        bits = torch.ones(shape, dtype=torch.bool) if number < 0 else lists.bits(number)[: shape[0], : shape[1]]
        hidden.append(~bits)
    if not spans:
        return None
    whole = torch.cat(hidden, 1)
    return Listed(rows, tuple(spans), whole if bool(whole.any()) else None)
