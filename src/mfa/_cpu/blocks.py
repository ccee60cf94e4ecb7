"""How the CPU implementation cuts a problem: which keys a block of rows sees, what is added to its scores, what fits.

Ranges are half-open. Scratch memory is bounded by a budget, not by the lengths, so the whole stays O(L).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

HIDDEN = -math.inf
LARGEST_HIDING_BIAS = float(torch.tensor(-1e38))  # a bias of at most this, the float32 next to -1e38, hides its key
SCRATCH_BYTES = 16 << 20
BAND_BYTES = 64 << 20  # of a call with many alike blocks: every call has all threads start, and wait for each other
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Window:
    """Which keys a query sees: `-left <= j - (i + shift) <= right`, with shift = Lk - Lq."""

    query_length: int
    key_length: int
    left: int
    right: int

    @classmethod
    def of(cls, query_length: int, key_length: int, left: int | None, right: int | None) -> "Window":
        far = query_length + key_length  # as good as open
        bound = [far if side is None else max(-far, min(side, far)) for side in (left, right)]
        return cls(query_length, key_length, *bound)

    @property
    def shift(self) -> int:
        return self.key_length - self.query_length

    def rows(self) -> slice:
        """The rows that see a key."""
        if self.left + self.right < 0 or self.key_length == 0:
            return slice(0, 0)
        first = max(0, -self.shift - self.right)
        return slice(first, max(first, min(self.query_length, self.key_length + self.left - self.shift)))

    def keys(self, rows: slice) -> slice:
        """The keys that some row of `rows` sees; every one of those rows sees one."""
        first = max(0, rows.start + self.shift - self.left)
        return slice(first, min(self.key_length, rows.stop + self.shift + self.right))

    def hides(self, rows: slice, keys: slice) -> bool:
        """Whether some row of `rows` doesn't see some key of `keys`."""
        last_sees_first = rows.stop - 1 + self.shift - self.left <= keys.start
        first_sees_last = rows.start + self.shift + self.right >= keys.stop - 1
        return not (last_sees_first and first_sees_last)

    def block_rows(self) -> int:
        """How many rows to compute at a time: few for a narrow window, since what it hides in a block costs as much."""
        return max(64, min(BLOCK_ROWS, 1 << (max(0, self.left + self.right) // 8).bit_length()))

    def block_keys(self, rows: int) -> int:
        """The most keys that a block of so many rows sees."""
        return min(self.key_length, max(0, self.left + self.right) + rows)

    def is_causal(self, first_row: int) -> bool:
        """Whether `first_row` sees key 0 only, and each further row one key more."""
        return first_row + self.shift + self.right == 0 and self.left >= self.key_length - 1


class Block(Protocol):
    """Rows, and the keys that they see."""

    @property
    def rows(self) -> slice: ...
    @property
    def spans(self) -> tuple[slice, ...]:
        """Of keys."""

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Those rows of a tensor [B,H,L,...] of queries."""

    def of_keys(self, tensor: Tensor) -> Tensor: ...
    def add_to_keys(self, target: Tensor, summand: Tensor) -> None: ...
    def added(self, masks: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        """What is added to the block's scores, of what is added to each span's."""


@dataclass
class Terms:
    """What is added to the scaled scores: window, bias and ALiBi, as one additive mask per block."""

    window: Window
    bias: Tensor | None  # each dimension is 1 or that of [B,Hq,Lq,Lk]
    slopes: Tensor | None  # [B or 1,Hq,1,1]
    dtype: torch.dtype
    _pattern: tuple[tuple[int, int, int], Tensor | None] = field(default=((0, 0, 0), None), init=False)

    def distances(self, rows: slice, keys: slice) -> Tensor:
        """j - (i+Lk-Lq) of a block, int32 [rows,keys]."""
        diagonal = torch.arange(rows.start, rows.stop, dtype=torch.int32).add_(self.window.shift)
        return torch.arange(keys.start, keys.stop, dtype=torch.int32) - diagonal[:, None]

    def _window_mask(self, rows: slice, keys: slice) -> Tensor | None:
        """0 where the window lets a row see a key, -inf elsewhere; None if it hides nothing. Alike blocks share one."""
        if not self.window.hides(rows, keys):
            return None
        shape = (rows.stop - rows.start, keys.stop - keys.start, keys.start - rows.start)
        if self._pattern[0] != shape:
            distances = self.distances(rows, keys)
            hidden = (distances > self.window.right) | (distances < -self.window.left)
            self._pattern = (shape, torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, HIDDEN))
        return self._pattern[1]

    def _alibi_mask(self, batches: slice, heads: slice, rows: slice, keys: slice) -> Tensor | None:
        if self.slopes is None:
            return None
        return self.distances(rows, keys).abs_().to(self.dtype) * part(self.slopes, batches, heads).neg()

    def _bias_mask(self, batches: slice, heads: slice, rows: slice, keys: slice) -> Tensor | None:
        if self.bias is None:
            return None
        bias = part(self.bias, batches, heads, rows, keys)
        if bias.dtype == torch.bool:
            return torch.zeros(bias.shape, dtype=self.dtype).masked_fill_(~bias, HIDDEN)
        bias = bias.to(self.dtype)
        return bias.masked_fill(bias <= LARGEST_HIDING_BIAS, HIDDEN)

    def mask(self, batches: slice, heads: slice, rows: slice, keys: slice) -> Tensor | None:
        """The additive mask of a block, broadcastable to it in its first two dimensions; None if it would be zero."""
        parts = [
            self._window_mask(rows, keys),
            self._alibi_mask(batches, heads, rows, keys),
            self._bias_mask(batches, heads, rows, keys),
        ]
        masks = [mask for mask in parts if mask is not None]
        if not masks:
            return None
        total = masks[0]
        for mask in masks[1:]:
            total = total + mask
        return total.expand(*total.shape[:-2], rows.stop - rows.start, keys.stop - keys.start)

    def as_one_block(self, scale: float) -> tuple[bool, bool]:
        """Whether ATen's kernel takes all rows that see a key as one block, without a mask; and whether as causal.

        ATen multiplies its causal -inf by the scale.
        """
        visible = self.window.rows()
        if self.bias is not None or self.slopes is not None or visible.start == visible.stop:
            return False, False
        causal = scale > 0 and self.window.is_causal(visible.start)
        return causal or not self.window.hides(visible, self.window.keys(visible)), causal

    def of_block(self, batches: slice, heads: slice, block: "Block") -> Tensor | None:
        """`mask` of a block, with what its own mask hides."""
        masks = [self.mask(batches, heads, block.rows, span) for span in block.spans]
        return block.added(masks, self.dtype)

    def mask_copies(self) -> tuple[int, int]:
        """How many rows of mask a block holds per query row: for each head of a batch, and for each batch."""
        batches, heads = (0, 0) if self.bias is None else self.bias.shape[:2]
        own_heads = heads > 1 or self.slopes is not None
        return (1, 0) if own_heads else (0, 1 if batches > 1 else 0)


def part(tensor: Tensor, *ranges: slice) -> Tensor:
    """tensor[ranges], where a dimension of size 1 stands for all of its range."""
    return tensor[tuple(slice(None) if size == 1 else span for size, span in zip(tensor.shape, ranges, strict=False))]


@dataclass(frozen=True)
class Band:
    """Blocks of as many rows each, one after the other, that see as many keys each: the next one's begin as much later.

    They are as many batches of one problem: what a band hides from each is the same.
    """

    rows: slice  # of the first block
    keys: slice  # that it sees
    count: int = 1

    @property
    def spans(self) -> tuple[slice, ...]:
        return (self.keys,)

    def added(self, masks: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
        return masks[0]

    @property
    def step(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """[B,H,L,...] of queries -> a view [count,H,rows,...]; of more than one block, B is 1."""
        return _strided(tensor, self.rows, self.step, self.count)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """The same of [B,H,L,...] of keys; blocks overlap."""
        return _strided(tensor, self.keys, self.step, self.count)

    @property
    def apart(self) -> int:
        """So many blocks apart, two see no key in common."""
        return 1 if self.count == 1 else -(-int(self.keys.stop - self.keys.start) // self.step)

    def add_to_keys(self, target: Tensor, summand: Tensor) -> None:
        """target[B,H,L,D] += summand [count,H,keys,D], block after block: those at once that don't overlap."""
        for first in range(min(self.apart, self.count)):
            some = summand if self.count == 1 else summand[first :: self.apart]
            keys = slice(self.keys.start + first * self.step, self.keys.stop + first * self.step)
            view = _strided(target, keys, self.apart * self.step, 1 if self.count == 1 else len(some))
            view += some


def _strided(tensor: Tensor, span: slice, step: int, count: int) -> Tensor:
    first = tensor[:, :, span]
    if count == 1:
        return first
    return first.as_strided((count, *first.shape[1:]), (step * tensor.stride(2), *first.stride()[1:]))


@dataclass(frozen=True)
class Cut:
    """A problem's chunks of heads, and their blocks of rows; what a block needs in scratch memory fits the budget."""

    batch: int
    key_heads: int
    group: int  # query heads per key head
    batches: int  # per chunk
    heads: int  # key heads per chunk
    rows: int  # query rows per block
    window: Window

    @classmethod
    def of(
        cls,
        terms: Terms,
        batch: int,
        key_heads: int,
        group: int,
        operand_bytes: int,
        score_copies: int,
        least: int = 1,
    ) -> "Cut":
        """
        Args:
            operand_bytes: scratch for one key head's copied operands.
            score_copies: how many matrices of scores a block holds at a time, per query head.
            least: how many key heads of a batch a chunk has at least, whatever they need.
        """
        window = terms.window
        rows = window.block_rows()
        row_bytes = window.block_keys(rows) * terms.dtype.itemsize
        per_head, per_batch = terms.mask_copies()
        head_bytes = (per_head + score_copies) * group * row_bytes
        batch_bytes = per_batch * row_bytes
        least = max(1, min(least, key_heads))
        rows = max(1, min(rows, SCRATCH_BYTES // max(1, row_bytes, least * head_bytes + batch_bytes)))

        budget = SCRATCH_BYTES
        chunk_bytes = max(1, operand_bytes, head_bytes * rows)
        batches = budget // (chunk_bytes * key_heads + batch_bytes * rows)
        heads = key_heads if batches else max(least, (budget - batch_bytes * rows) // chunk_bytes)
        return cls(batch, key_heads, group, max(1, batches), heads, rows, window)

    def chunks(self) -> Iterator[tuple[slice, slice, slice]]:
        """Ranges of batches, of key heads and of their query heads."""
        for first in range(0, self.batch, self.batches):
            for head in range(0, self.key_heads, self.heads):
                end = min(head + self.heads, self.key_heads)
                heads, query_heads = slice(head, end), slice(head * self.group, end * self.group)
                yield slice(first, min(first + self.batches, self.batch)), heads, query_heads

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Ranges of rows that see a key, and of the keys that they see."""
        visible = self.window.rows()
        for first in range(visible.start, visible.stop, self.rows):
            rows = slice(first, min(first + self.rows, visible.stop))
            yield rows, self.window.keys(rows)

    def banded(self, block_bytes: int) -> tuple["Cut", int]:
        """The cut with batches of alike blocks instead of batches of the problem, if those are more; and how many.

        Args:
            block_bytes: scratch for a block of one key head.
        """
        most = BAND_BYTES // max(1, block_bytes * self.heads)
        visible = self.window.rows()
        if min(most, (visible.stop - visible.start) // self.rows) <= min(self.batches, self.batch):
            return self, 1
        return replace(self, batches=1), most

    def bands(self, most: int) -> Iterator[Band]:
        """The blocks, alike ones that follow each other together: at most `most` of them."""
        band: Band | None = None
        for rows, keys in self.blocks():
            if band is not None and band.count < most and _continues(band, rows, keys):
                band = replace(band, count=band.count + 1)
                continue
            if band is not None:
                yield band
            band = Band(rows, keys)
        if band is not None:
            yield band


def _continues(band: Band, rows: slice, keys: slice) -> bool:
    later = band.count * band.step
    return all(
        (span.start - later, span.stop - later) == (first.start, first.stop)
        for span, first in ((rows, band.rows), (keys, band.keys))
    )
