"""mfa.pack_block_mask: what it packs is what the mask says; lists and classes are those of the bits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from mfa._remembered import remembered
from mfa.block_mask import BLOCK, TILE, Lists, PackedBlockMask, pack_block_mask


def random_mask(density: float, seed: int, sizes: tuple[int, int, int, int]) -> Any:
    """A captured tensor that mixes hidden, open and mixed blocks."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(sizes[0], sizes[1], -(-sizes[2] // 40), -(-sizes[3] // 56), generator=generator)
    fine = torch.rand(sizes, generator=generator)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        where = coarse[b, h, q_idx // 40, kv_idx // 56]
        return (where < density / 2) | ((where < density) & (fine[b, h, q_idx, kv_idx] < 0.5))

    return mask


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, tuple[int, int, int, int], tuple[int, int]]:
    sizes = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 300)), draw(st.integers(1, 300)))
    block = (16 * draw(st.integers(1, 10)), 16 * draw(st.integers(1, 10)))
    return random_mask(draw(st.sampled_from([0, 0.3, 0.7, 1, 2])), draw(st.integers(0, 99)), sizes), sizes, block


@settings(max_examples=25)
@given(cases(), st.booleans())
def test_what_is_packed_is_the_mask(
    case: tuple[Any, tuple[int, int, int, int], tuple[int, int]], has_full_blocks: bool
) -> None:
    mask, sizes, block = case
    given_mask = create_block_mask(mask, *sizes, device="cpu", BLOCK_SIZE=block)
    if not has_full_blocks:
        every = torch.arange(-(-sizes[3] // block[1]), dtype=torch.int32).expand(*given_mask.kv_num_blocks.shape, -1)
        counts = torch.full_like(given_mask.kv_num_blocks, every.shape[-1])
        given_mask = BlockMask.from_kv_blocks(counts, every, BLOCK_SIZE=block, mask_mod=mask, seq_lengths=sizes[2:])
    found = pack_block_mask(given_mask)
    expected = create_mask(mask, *sizes, device="cpu")
    assert found.shape == sizes
    assert torch.equal(found.to_dense(), expected)
    assert torch.equal(PackedBlockMask.of(mask, sizes).to_dense(), expected)
    lists = Lists.of(found.data)
    header = lists.header
    assert len(found.data) == header["size"]
    padded = torch.zeros(*sizes[:2], header["query_blocks"] * BLOCK, header["key_blocks"] * BLOCK, dtype=torch.bool)
    padded[:, :, : sizes[2], : sizes[3]] = expected
    exists = torch.zeros_like(padded)
    exists[:, :, : sizes[2], : sizes[3]] = True

    table = lists.section("table", header["entries"], 8)
    order: dict[tuple[int, int, int], list[int]] = {}
    number = mixed = 0
    for b, h, i, entries in lists.rows():
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        seen = [j for j in range(header["key_blocks"]) if padded[b, h, rows, j * BLOCK : (j + 1) * BLOCK].any()]
        assert entries[:, 1].tolist() == seen  # what is hidden has no entry
        for entry in entries:
            assert torch.equal(entry, table[number])
            key_block = int(entry[1])
            part = (b, h, rows, slice(key_block * BLOCK, (key_block + 1) * BLOCK))
            is_open = bool((padded[part] | ~exists[part]).all())
            assert int(entry[2]) == (-1 if is_open else mixed)
            mixed += not is_open
            tiles = (8, TILE, 8, TILE)
            some = padded[part].view(tiles).any(3).any(1)
            every = (padded[part] | ~exists[part]).view(tiles).all(3).all(1)
            classes = (entry[4:, None] >> 2 * torch.arange(16)) & 3
            assert torch.equal(classes.view(8, 8), some.int() + 2 * (~every).int())
            order.setdefault((b, h, key_block), []).append(number)
            number += 1
    assert (number, mixed) == (header["entries"], header["mixed_blocks"])

    maps = sizes[0] * sizes[1]
    starts = lists.section("key_starts", maps, header["key_blocks"] + 1)
    key_entries = lists.section("key_entries", header["entries"]).tolist()
    for m in range(maps):
        for j in range(header["key_blocks"]):
            listed = key_entries[int(starts[m, j]) : int(starts[m, j + 1])]
            assert listed == order.get((m // sizes[1], m % sizes[1], j), [])
    for name in ("query", "key"):
        count = lists.section(f"{name}_starts", maps, header[f"{name}_blocks"] + 1).diff()
        heavy = lists.section(f"{name}_order", maps, header[f"{name}_blocks"]).long()
        assert torch.equal(heavy.sort(1).values, torch.arange(header[f"{name}_blocks"]).expand_as(heavy))
        assert bool((count.gather(1, heavy).diff() <= 0).all())


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def test_memory_is_that_of_what_is_seen_in_part() -> None:
    """No matrix of the lengths: 16384 x 16384 would be 2^28."""
    length = 16384
    found = pack_block_mask(create_block_mask(causal, None, None, length, length, device="cpu"))
    blocks = length // BLOCK
    entries, bits = blocks * (blocks + 1) // 2, blocks * BLOCK * BLOCK // 8
    assert found.data.nbytes <= bits + 36 * entries + 16 * (2 * blocks + 1) + 256
    header = Lists.of(found.data).header
    assert (header["entries"], header["mixed_blocks"]) == (entries, blocks)


def test_a_block_mask_is_packed_once() -> None:
    block_mask = create_block_mask(causal, None, None, 200, 200, device="cpu")
    one = remembered(block_mask)
    assert remembered(block_mask) is one
    assert torch.equal(one.data, pack_block_mask(block_mask).data)


def test_errors() -> None:
    with pytest.raises(TypeError, match="block_mask is of type Tensor"):
        pack_block_mask(torch.ones(3, 3))  # type: ignore[arg-type]
    ones = torch.ones(1, 1, 1, dtype=torch.int32)
    odd = BlockMask.from_kv_blocks(ones, ones[..., None] * 0, BLOCK_SIZE=(24, 16))
    with pytest.raises(ValueError, match="BLOCK_SIZE \\(24, 16\\)"):
        pack_block_mask(odd)
