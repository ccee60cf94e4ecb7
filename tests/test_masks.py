"""mfa.masks against their definitions, position by position, and as torch's FlexAttention takes them."""

import itertools
import math
from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from mfa import masks

Definition = Callable[[int, int, int], bool]  # of batch, query and key


def agrees(mask: masks.Mask, definition: Definition, length_q: int, length_k: int, batch: int = 1) -> None:
    found = create_mask(mask, batch, 1, length_q, length_k, device="cpu")
    for b, i, j in itertools.product(range(batch), range(length_q), range(length_k)):
        assert bool(found[b, 0, i, j]) == definition(b, i, j), (b, i, j)


def test_causal_and_prefix() -> None:
    agrees(masks.causal(), lambda b, i, j: j <= i, 5, 7)
    agrees(masks.causal(2), lambda b, i, j: j <= i + 2, 5, 7)
    agrees(masks.prefix(3), lambda b, i, j: j < 3, 5, 7)
    lengths = torch.tensor([0, 2, 7])
    agrees(masks.prefix(lengths), lambda b, i, j: j < lengths[b], 4, 7, batch=3)


def test_document() -> None:
    bounds = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)

    def number(i: int) -> int:
        return sum(i >= int(bound) for bound in bounds[1:]) if i < 9 else -1

    agrees(masks.document(bounds), lambda b, i, j: number(i) == number(j) >= 0, 12, 11)
    for wrong in ([1, 2], [0, 3, 2], [0], [[0, 1]]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            masks.document(torch.tensor(wrong))


def test_combinations() -> None:
    def even(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return kv_idx % 2 == 0

    agrees(masks.prefix(2) | masks.causal(), lambda b, i, j: j < 2 or j <= i, 6, 6)
    agrees(masks.causal() & even, lambda b, i, j: j <= i and j % 2 == 0, 6, 6)
    agrees(even & masks.causal(), lambda b, i, j: j <= i and j % 2 == 0, 6, 6)
    agrees(even | masks.causal(), lambda b, i, j: j <= i or j % 2 == 0, 6, 6)
    assert repr(even | masks.causal() & masks.prefix(3)) == "(even | (causal() & prefix(3)))"


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=3)


@settings(max_examples=40)
@given(grids)
def test_neighbourhood(dimensions: list[tuple[int, int, int]]) -> None:
    """Of the keys in a query's residue class, as many as the window has, before it and behind, moved inside."""
    window, dilation = [w for w, _, _ in dimensions], [d for _, d, _ in dimensions]
    shape = [w * d + more for w, d, more in dimensions]
    while math.prod(shape) > 60:
        shape, window, dilation = shape[:-1], window[:-1], dilation[:-1]
        if not shape:
            return
    points = list(itertools.product(*map(range, shape)))

    def seen(i: int, size: int, width: int, step: int) -> set[int]:
        like = [j for j in range(size) if (j - i) % step == 0]
        at = like.index(i)
        starts = range(len(like) - width + 1)
        start = min(starts, key=lambda s: abs(s - (at - width // 2)))
        return set(like[start : start + width])

    def definition(b: int, i: int, j: int) -> bool:
        if max(i, j) >= len(points):
            return False
        axes = zip(points[i], points[j], shape, window, dilation, strict=True)
        return all(k in seen(q, n, w, d) for q, k, n, w, d in axes)

    agrees(masks.neighbourhood(shape, window, dilation), definition, len(points) + 2, len(points) + 1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3))
def test_sliding_tile(dimensions: list[tuple[int, int, int]]) -> None:
    """In row-major order, through tile_order: a token sees whole tiles, as many as the window has."""
    tile = [t for _, _, t in dimensions]
    shape = [n * t for n, _, t in dimensions]
    window = [min(n, w) * t for n, w, t in dimensions]
    while math.prod(shape) > 60:
        shape, window, tile = shape[:-1], window[:-1], tile[:-1]
        if not shape:
            return
    points = list(itertools.product(*map(range, shape)))
    order = masks.tile_order(shape, tile)
    assert sorted(order.tolist()) == list(range(len(points)))
    corners = [tuple(x // t for x, t in zip(points[p], tile, strict=True)) for p in order]
    assert corners == sorted(corners)  # tile after tile

    def definition(b: int, i: int, j: int) -> bool:
        if max(i, j) >= len(points):
            return False
        for q, k, n, w, t in zip(points[order[i]], points[order[j]], shape, window, tile, strict=True):
            starts = range(n // t - w // t + 1)
            start = min(starts, key=lambda s: abs(s - (q // t - w // t // 2)))
            if not start <= k // t < start + w // t:
                return False
        return True

    agrees(masks.sliding_tile(shape, window, tile), definition, len(points) + 1, len(points) + 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.neighbourhood((4, 4), (2,)), "2, 1 and 2 dimensions"),
        (lambda: masks.neighbourhood((4,), (3,), 2), "window \\* dilation"),
        (lambda: masks.neighbourhood((4,), (0,)), "window \\* dilation"),
        (lambda: masks.sliding_tile((4, 4), (2, 3), (2, 2)), "window \\(2, 3\\)"),
        (lambda: masks.sliding_tile((4, 4), (2, 6), (2, 2)), "window \\(2, 6\\)"),
        (lambda: masks.sliding_tile((4, 5), (2, 2), (2, 2)), "shape \\(4, 5\\)"),
        (lambda: masks.tile_order((4,), (0,)), "shape \\(4,\\)"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


MASKS = {
    "prefix": masks.prefix(100) | masks.causal(),
    "document": masks.document(torch.tensor([0, 70, 200, 256])) & masks.causal(),
    "neighbourhood": masks.neighbourhood((16, 16), (5, 4), (1, 2)),
    "sliding tile": masks.sliding_tile((4, 8, 8), (2, 8, 4), (2, 4, 4)),
}


@pytest.mark.parametrize("name", MASKS)
def test_flex_attention_takes_them(name: str) -> None:
    mask = MASKS[name]
    query, key, value = (torch.randn(2, 2, 256, 16, dtype=torch.float64) for _ in range(3))
    block_mask = create_block_mask(mask, None, None, 256, 256, device="cpu")
    out = flex_attention(query, key, value, block_mask=block_mask)
    expected = oracle.attention(query, key, value, bias=create_mask(mask, 1, 1, 256, 256, device="cpu"))[0]
    torch.testing.assert_close(out, expected)
