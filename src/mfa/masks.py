"""Structured masks, each a `mask_mod` of torch's FlexAttention: which keys a query sees, as a function of positions.

    mask = masks.prefix(256) | masks.causal()
    block_mask = torch.nn.attention.flex_attention.create_block_mask(mask, None, None, length, length)

Positions count from 0 on both sides: where there are fewer queries than keys, `causal(offset)` says how the two align.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask:
    """A mask_mod: of batch, head, query and key positions, integer tensors, it says where the query sees the key.

    `&` and `|` combine it with another one, or with any function of these four arguments.
    """

    def __init__(self, function: _Function, name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self._function(b, h, q_idx, kv_idx)

    def __repr__(self) -> str:
        return self._name

    def __and__(self, other: _Function) -> "Mask":
        return _combined(self, other, "&", torch.logical_and)

    def __or__(self, other: _Function) -> "Mask":
        return _combined(self, other, "|", torch.logical_or)

    def __rand__(self, other: _Function) -> "Mask":
        return _combined(other, self, "&", torch.logical_and)

    def __ror__(self, other: _Function) -> "Mask":
        return _combined(other, self, "|", torch.logical_or)


def _combined(first: _Function, second: _Function, sign: str, both: Callable[[Tensor, Tensor], Tensor]) -> Mask:
    names = [
        repr(each) if isinstance(each, Mask) else getattr(each, "__name__", "mask_mod") for each in (first, second)
    ]

    def function(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return both(first(b, h, q_idx, kv_idx), second(b, h, q_idx, kv_idx))

    return Mask(function, f"({names[0]} {sign} {names[1]})")


def causal(offset: int = 0) -> Mask:
    """Query i sees key j iff j <= i + offset. With offset Lk - Lq, the last query sees the last key."""
    return Mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset, f"causal({offset or ''})")


def prefix(length: int | Tensor) -> Mask:
    """Every query sees the first `length` keys: a number, or int [B], one per batch entry."""
    if isinstance(length, Tensor):
        lengths = length
        return Mask(lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], "prefix(...)")
    return Mask(lambda b, h, q_idx, kv_idx: kv_idx < length, f"prefix({length})")


def document(cu_seqlens: Tensor) -> Mask:
    """Tokens see those of their own document only.

    Args:
        cu_seqlens: int [N+1], where the N documents begin, and the end of the last; tokens behind it see nothing.

    Raises:
        ValueError: cu_seqlens does not rise from 0.
    """
    lengths = cu_seqlens.diff()
    if cu_seqlens.dim() != 1 or len(lengths) == 0 or int(cu_seqlens[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError("cu_seqlens must be [N+1] numbers that rise from 0")
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    documents = torch.cat([numbers.repeat_interleave(lengths), numbers.new_full((1,), -1)])
    end = len(documents) - 1

    def function(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own, other = documents[q_idx.clamp(max=end)], documents[kv_idx.clamp(max=end)]
        return (own == other) & (own >= 0)

    return Mask(function, f"document({len(lengths)} documents)")


def neighbourhood(shape: Sequence[int], window: Sequence[int], dilation: Sequence[int] | int = 1) -> Mask:
    """Neighbourhood attention (Hassani et al. 2023, NATTEN): on a grid, a query sees the `window` of nearest keys.

    Along each dimension a query sees the `window` keys around it that are a multiple of `dilation` away; near a border
    the window is moved inside, so that every query sees as many. Tokens are in row-major order; those behind the grid
    see nothing, and nothing sees them.

    Args:
        shape: sizes of the grid, one to three or more.
        window: keys along each dimension. Of an even number, one more lies before the query than behind it.
        dilation: for each dimension, or one for all.

    Raises:
        ValueError: numbers of dimensions differ, or window * dilation is larger than the grid.
    """
    steps = [dilation] * len(shape) if isinstance(dilation, int) else list(dilation)
    if not len(shape) == len(window) == len(steps):
        raise ValueError(f"shape, window and dilation have {len(shape)}, {len(window)} and {len(steps)} dimensions")
    if min(*window, *steps, *shape, 1) < 1 or any(w * d > n for n, w, d in zip(shape, window, steps, strict=True)):
        raise ValueError(
            f"window * dilation must be 1 to shape, {tuple(shape)}; they are {tuple(window)}, {tuple(steps)}"
        )

    def sees(q: Tensor, k: Tensor, size: int, width: int, step: int) -> Tensor:
        # Positions that are a multiple of `step` apart form a grid of their own: (size - first) / step, rounded up.
        first = q % step
        last_start = (size - first + step - 1) // step - width
        start = torch.minimum((q // step - width // 2).clamp(min=0), last_start)
        return (k % step == first) & (k // step >= start) & (k // step < start + width)

    return _on_grid(shape, list(shape), sees, list(zip(shape, window, steps, strict=True)), "neighbourhood")


def sliding_tile(shape: Sequence[int], window: Sequence[int], tile: Sequence[int]) -> Mask:
    """Sliding tile attention (Zhang et al. 2025): on a grid cut into tiles, tokens of a tile see a window of tiles.

    The window is centred on the query's tile, and moved inside near a border. Tokens are in tile-major order (see
    `tile_order`): tile after tile, row-major inside each, so that hidden tiles are hidden blocks. Those behind the
    grid, for example of a text, see nothing: add them with `|`.

    Args:
        shape: sizes of the grid in tokens, multiples of `tile`.
        window: in tokens, multiples of `tile`.

    Raises:
        ValueError: numbers of dimensions differ, a size is no multiple of its tile, or the window exceeds the grid.
    """
    tiles = _tiles(shape, tile)
    widths = [w // t for w, t in zip(window, tile, strict=False)]
    if len(window) != len(shape) or any(
        w < 1 or w * t != have or w > n for w, t, have, n in zip(widths, tile, window, tiles, strict=True)
    ):
        raise ValueError(f"window {tuple(window)} must be multiples of tile {tuple(tile)} within shape {tuple(shape)}")

    def sees(q: Tensor, k: Tensor, size: int, width: int) -> Tensor:
        start = (q - width // 2).clamp(0, size - width)
        return (k >= start) & (k < start + width)

    # A tile-major position is that of a tile, and one inside it.
    inner = math.prod(tile)
    return _on_grid([*tiles, inner], tiles, sees, list(zip(tiles, widths, strict=True)), "sliding_tile")


def tile_order(shape: Sequence[int], tile: Sequence[int]) -> Tensor:
    """Where each token of the tile-major order is in row-major order: int64 [tokens].

    Raises:
        ValueError: a size is no multiple of its tile.
    """
    tiles = _tiles(shape, tile)
    rank = len(tiles)
    sizes = [size for pair in zip(tiles, tile, strict=True) for size in pair]
    dims = [2 * d for d in range(rank)] + [2 * d + 1 for d in range(rank)]
    return torch.arange(math.prod(shape)).view(sizes).permute(dims).flatten()


def _tiles(shape: Sequence[int], tile: Sequence[int]) -> list[int]:
    if len(shape) != len(tile) or any(t < 1 or n < t or n % t for n, t in zip(shape, tile, strict=True)):
        raise ValueError(f"shape {tuple(shape)} must be multiples of tile {tuple(tile)}")
    return [n // t for n, t in zip(shape, tile, strict=True)]


def _on_grid(
    sizes: Sequence[int],
    shape: Sequence[int],
    sees: Callable[..., Tensor],
    arguments: Sequence[tuple[int, ...]],
    name: str,
) -> Mask:
    """A mask that is the conjunction of one per dimension of `shape`; positions are row-major in `sizes`."""
    tokens = math.prod(sizes)
    strides = [math.prod(sizes[d + 1 :]) for d in range(len(shape))]

    def function(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = (q_idx < tokens) & (kv_idx < tokens)
        for stride, size, each in zip(strides, shape, arguments, strict=True):
            found = found & sees(q_idx // stride % size, kv_idx // stride % size, *each)
        return found

    return Mask(function, f"{name}({'x'.join(map(str, shape))})")
