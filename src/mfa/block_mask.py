"""Block masks: those of torch's FlexAttention, evaluated once and packed as the kernels read them.

A packed mask has blocks of 128 queries x 128 keys. A block that is seen whole is one entry of a list; one that is seen
in part has a bit per score besides, and a class for each of its tiles of 16 x 16; one that is hidden is nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK, TILE = 128, 16
_TILES = BLOCK // TILE
_WORDS = BLOCK // 32  # of bits, per row of a block
_HIDDEN, _MIXED, _OPEN = 0, 1, 2  # states of blocks
_SEES, _HIDES = 1, 2  # classes of tiles have both, as in metal/mask_classes.h; behind the end, neither
# The words of the header; what follows lies where they say, in words.
HEADER = (
    "batch",
    "heads",
    "query_length",
    "key_length",
    "query_blocks",  # rows of blocks
    "key_blocks",
    "entries",
    "mixed_blocks",
    "query_starts",  # [batch,heads,query_blocks + 1]: where the entries of a row of blocks begin
    "key_starts",  # [batch,heads,key_blocks + 1]: the same in key_entries
    "key_entries",  # [entries]: entries, by key block
    "query_order",  # [batch,heads,query_blocks]: rows of blocks, those with most entries first
    "key_order",  # [batch,heads,key_blocks]
    "table",  # [entries,8]: query block, key block, its number among the mixed ones or -1, 0, classes of 64 tiles
    "bits",  # [mixed_blocks,128,4]: bit j % 32 of word j / 32 of row i says whether i sees j
    "size",  # of all
)
_TABLE_COLUMNS = 8
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch entry, head, query and key


@dataclass(frozen=True)
class PackedBlockMask:
    """A mask of which only the blocks that are seen take memory; `mfa.attention` takes it as `block_mask`.

    Attributes:
        data: int32 [words], what the ops get.
        shape: (B, H, Lq, Lk); B and H are 1 where all batch entries or heads share the mask.
    """

    data: Tensor
    shape: tuple[int, int, int, int]

    @classmethod
    def of(
        cls, mask_mod: MaskMod, shape: tuple[int, int, int, int], device: torch.device | str = "cpu"
    ) -> PackedBlockMask:
        """Asks `mask_mod` for every score, 128 queries at a time; `create_block_mask` makes a matrix [B,H,Lq,Lk] first.

        Args:
            mask_mod: torch's: of batch entry, head, query and key, whether it is seen. What it reads is on `device`.
            shape: (B, H, Lq, Lk); B and H are 1 where all batch entries or heads share the mask.
        """
        batch, heads, length_q, length_k = shape
        every = (batch, heads, _count(length_q, BLOCK), _count(length_k, BLOCK))
        states = torch.full(every, _MIXED, dtype=torch.uint8, device=device)
        return _pack(mask_mod, (BLOCK, BLOCK), states, shape)

    def to(self, device: torch.device | str) -> PackedBlockMask:
        """The mask on another device."""
        return PackedBlockMask(self.data.to(device), self.shape)

    def to_dense(self) -> Tensor:
        """bool [B,H,Lq,Lk]; True where a query sees a key."""
        return dense(self.data)


def pack_block_mask(block_mask: BlockMask) -> PackedBlockMask:
    """Evaluates a mask of `torch.nn.attention.flex_attention` once, where its blocks are seen in part.

    Args:
        block_mask: its block sizes are multiples of 16; lengths need not be multiples of them.

    Returns:
        The packed mask, on its device. A score is seen where its block is full, or partial and mask_mod True.

    Raises:
        TypeError: block_mask is no BlockMask.
        ValueError: a block size is no multiple of 16.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask is of type {type(block_mask).__name__}; it must be a BlockMask")
    sizes = block_mask.BLOCK_SIZE
    if any(size % TILE for size in sizes):
        raise ValueError(f"block_mask has BLOCK_SIZE {tuple(sizes)}; both must be multiples of {TILE}")
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    return _pack(block_mask.mask_mod, sizes, _states(block_mask), (batch, heads, *block_mask.seq_lengths))


def _pack(
    mask_mod: MaskMod, sizes: tuple[int, int], states: Tensor, shape: tuple[int, int, int, int]
) -> PackedBlockMask:
    """`states` [B,H,..] are of blocks of `sizes`; where one is mixed, `mask_mod` says which scores are seen."""
    found = [_row(mask_mod, sizes, states, shape, b, h, i) for b, h, i in _rows_of_blocks(shape)]
    return PackedBlockMask(_packed(shape, found, states.device), shape)


def _rows_of_blocks(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int]]:
    batch, heads, length, _ = shape
    for b in range(batch):
        for h in range(heads):
            for i in range(_count(length, BLOCK)):
                yield b, h, i


def _count(length: int, size: int) -> int:
    return (length + size - 1) // size


def _states(block_mask: BlockMask) -> Tensor:
    """uint8 [B,H,blocks of queries,blocks of keys] in its own block sizes: hidden, mixed or open."""
    partial, full = block_mask.kv_num_blocks, block_mask.full_kv_num_blocks
    indices, full_indices = block_mask.kv_indices, block_mask.full_kv_indices
    states = torch.zeros(indices.shape, dtype=torch.uint8, device=indices.device)
    numbers = torch.arange(indices.shape[-1], device=indices.device)
    for count, index, state in ((partial, indices, _MIXED), (full, full_indices, _OPEN)):
        if count is not None and index is not None:
            listed = (numbers < count[..., None]) * state
            states.scatter_reduce_(-1, index.long(), listed.to(torch.uint8), "amax")
    return states


# Of a row of blocks: the key blocks, and of each its number among the row's mixed ones (or -1), classes and bits.
_Row = tuple[Tensor, Tensor, Tensor, Tensor]


def _row(
    mask_mod: MaskMod,
    sizes: tuple[int, int],
    states: Tensor,
    shape: tuple[int, int, int, int],
    b: int,
    h: int,
    row: int,
) -> _Row:
    device, (_, _, length_q, length_k) = states.device, shape
    q = torch.arange(row * BLOCK, (row + 1) * BLOCK, device=device)
    tiles_q = torch.arange(row * _TILES, (row + 1) * _TILES, device=device) * TILE
    tiles_k = torch.arange(_count(length_k, BLOCK) * _TILES, device=device) * TILE
    size_q, size_k = sizes
    # A tile behind the end is whatever its neighbours are: nobody asks.
    tile_states = states[b, h][(tiles_q.clamp(max=length_q - 1) // size_q)][
        :, tiles_k.clamp(max=length_k - 1) // size_k
    ]
    tile_states = tile_states.view(_TILES, -1, _TILES).transpose(0, 1)  # [key blocks,8,8]
    seen = (tile_states != _HIDDEN).any(2).any(1)
    whole = (tile_states == _OPEN).all(2).all(1)
    mixed = (seen & ~whole).nonzero().squeeze(1)
    keys = mixed[:, None] * BLOCK + torch.arange(BLOCK, device=device)
    bits = tile_states[mixed].repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
    bits = (bits == _OPEN) | ((bits == _MIXED) & _evaluated(mask_mod, b, h, q, keys, length_q, length_k))
    exists = (q < length_q)[:, None] & (keys < length_k)[:, None]
    tiles = (len(mixed), _TILES, TILE, _TILES, TILE)
    some = (bits & exists).view(tiles).any(4).any(2)
    every = (bits | ~exists).view(tiles).all(4).all(2)
    classes = _SEES * ((tiles_q < length_q)[:, None] & (tiles_k < length_k)).view(_TILES, -1, _TILES).transpose(0, 1)
    classes[mixed] = some * _SEES + ~every * _HIDES
    # Some of these turn out to be hidden or open.
    seen[mixed], whole[mixed] = some.any(2).any(1), every.all(2).all(1)
    remains = seen[mixed] & ~whole[mixed]
    listed = seen.nonzero().squeeze(1)
    numbers = torch.full_like(seen, -1, dtype=torch.int64)
    numbers[mixed[remains]] = torch.arange(int(remains.sum()), device=device)
    return listed, numbers[listed], classes[listed], (bits & exists)[remains]


def _evaluated(mask_mod: MaskMod, b: int, h: int, q: Tensor, keys: Tensor, length_q: int, length_k: int) -> Tensor:
    """bool [blocks,128,128], of queries q [128] and keys [blocks,128]; positions behind the ends are the last ones."""
    if keys.numel() == 0:
        return torch.zeros((0, BLOCK, BLOCK), dtype=torch.bool, device=keys.device)
    from torch.nn.attention.flex_attention import create_mask

    queries, flat = q.clamp(max=length_q - 1), keys.clamp(max=length_k - 1).flatten()
    found = create_mask(
        lambda batch, head, i, j: mask_mod(batch + b, head + h, queries[i], flat[j]),
        *(1, 1, BLOCK, flat.numel()),
        device=str(keys.device),
    )
    return found.to(torch.bool).view(BLOCK, -1, BLOCK).transpose(0, 1)


def _words(values: Tensor, width: int) -> Tensor:
    """int64 [..., n] of `width` bits each -> int32 [..., n * width / 32], the first in the lowest bits."""
    per_word = 32 // width
    shifts = torch.arange(per_word, device=values.device) * width
    words = (values.unflatten(-1, (-1, per_word)).to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _packed(shape: tuple[int, int, int, int], rows: list[_Row], device: torch.device) -> Tensor:
    batch, heads, length_q, length_k = shape
    query_blocks, key_blocks = _count(length_q, BLOCK), _count(length_k, BLOCK)
    counts = torch.tensor([len(row[0]) for row in rows], device=device).view(batch * heads, query_blocks)
    mixed_before = torch.tensor([0] + [len(row[3]) for row in rows], device=device).cumsum(0)
    first, entries = int(mixed_before[0]), int(counts.sum())
    table = torch.zeros((entries, _TABLE_COLUMNS), dtype=torch.int32, device=device)
    numbers = [torch.where(row[1] < 0, -1, row[1] + mixed_before[i]) for i, row in enumerate(rows)]
    if entries:
        every_row = torch.arange(batch * heads * query_blocks, device=device).repeat_interleave(counts.flatten())
        table[:, 0] = every_row % query_blocks
        table[:, 1] = torch.cat([row[0] for row in rows])
        table[:, 2] = torch.cat(numbers)
        table[:, 4:] = _words(torch.cat([row[2] for row in rows]).flatten(1), 2)
        maps = every_row // query_blocks
        by_key = torch.sort(maps * key_blocks + table[:, 1], stable=True)
        key_counts = torch.bincount(by_key.values, minlength=batch * heads * key_blocks).view(-1, key_blocks)
        key_entries = by_key.indices
    else:
        key_counts = counts.new_zeros((batch * heads, key_blocks))
        key_entries = counts.new_zeros(0)
    bits = torch.cat([_words(row[3], 1).flatten() for row in rows]) if rows else counts.new_zeros(0)
    sections = {
        "query_starts": _starts(counts),
        "key_starts": _starts(key_counts),
        "key_entries": key_entries,
        "query_order": counts.sort(dim=1, descending=True, stable=True).indices,
        "key_order": key_counts.sort(dim=1, descending=True, stable=True).indices,
        "table": table,
        "bits": bits,
    }
    header = dict.fromkeys(HEADER, first)
    header |= {"batch": batch, "heads": heads, "query_length": length_q, "key_length": length_k}
    header |= {"query_blocks": query_blocks, "key_blocks": key_blocks, "entries": entries}
    header["mixed_blocks"] = int(mixed_before[-1])
    parts = [torch.empty(0)]
    size = len(HEADER)
    for name, section in sections.items():
        header[name] = size
        flat = section.flatten().to(torch.int32)
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))  # each begins at a multiple of 16 bytes
        size += len(flat)
        parts.append(flat)
    header["size"] = size
    parts[0] = torch.tensor(list(header.values()), dtype=torch.int32, device=device)
    return torch.cat(parts)


def _starts(counts: Tensor) -> Tensor:
    """Where the entries of each begin, and the end of a map's last: [maps,blocks + 1]."""
    ends = counts.flatten().cumsum(0).view(counts.shape)
    return torch.cat([ends[:, :1] - counts[:, :1], ends], 1)


@dataclass(frozen=True)
class Lists:
    """What a packed mask holds, by name."""

    header: dict[str, int]
    data: Tensor

    @classmethod
    def of(cls, data: Tensor) -> Lists:
        return cls(dict(zip(HEADER, data[: len(HEADER)].tolist(), strict=True)), data)

    def section(self, name: str, *shape: int) -> Tensor:
        first = self.header[name]
        return self.data[first : first + torch.Size(shape).numel()].view(shape)

    def rows(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """Batch entry, head, row of blocks, and that row's entries of the table."""
        batch, heads, blocks = (self.header[name] for name in ("batch", "heads", "query_blocks"))
        starts = self.section("query_starts", batch, heads, blocks + 1).tolist()
        table = self.section("table", self.header["entries"], _TABLE_COLUMNS)
        for b in range(batch):
            for h in range(heads):
                for i in range(blocks):
                    yield b, h, i, table[starts[b][h][i] : starts[b][h][i + 1]]

    def bits(self, number: int) -> Tensor:
        """bool [128,128] of a mixed block."""
        words = self.section("bits", self.header["mixed_blocks"], BLOCK, _WORDS)[number]
        shifts = torch.arange(32, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & 1).to(torch.bool).view(BLOCK, BLOCK)


def dense(data: Tensor) -> Tensor:
    """bool [B,H,Lq,Lk] of the data of a packed mask."""
    lists = Lists.of(data)
    header = lists.header
    sizes = (header["batch"], header["heads"], header["query_blocks"] * BLOCK, header["key_blocks"] * BLOCK)
    found = torch.zeros(sizes, dtype=torch.bool, device=data.device)
    for b, h, i, entries in lists.rows():
        for _, key_block, number, *_ in entries.tolist():
            block = found[b, h, i * BLOCK : (i + 1) * BLOCK, key_block * BLOCK : (key_block + 1) * BLOCK]
            block.copy_(lists.bits(number) if number >= 0 else torch.ones_like(block))
    return found[:, :, : header["query_length"], : header["key_length"]]


def check_fits(shape: tuple[int, ...], query_shape: Sequence[int], key_length: int) -> None:
    """Refuses a mask of other sizes than a problem's."""
    batch, heads, length, _ = query_shape
    sizes = [batch, heads, length, key_length]
    if not (shape[0] in (1, batch) and shape[1] in (1, heads) and list(shape[2:]) == sizes[2:]):
        raise ValueError(
            f"block_mask has shape {list(shape)}; it must broadcast to [B,Hq,Lq,Lk] = {sizes}, in B and Hq only"
        )


def check(data: Tensor, query_shape: Sequence[int], key_length: int) -> None:
    """Refuses data that the host can see and that no `pack_block_mask` made for a problem of these sizes."""
    header = dict(zip(HEADER, data[: len(HEADER)].tolist(), strict=False))
    if header.get("size") != len(data):
        raise ValueError("block_mask is not what pack_block_mask makes")
    shape = tuple(header[name] for name in ("batch", "heads", "query_length", "key_length"))
    check_fits(shape, query_shape, key_length)
