"""Draws the figures of docs/ that show no measurement: `python docs/figures/draw.py` rewrites them beside itself."""

from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CELL = 34
COLOURS = ("#dbe9f6", "#f6e6d8")  # lanes alternate
MARKED = "#f2b35d"
EXAMPLE = 13  # the lane of the worked example in kernels.md


def lane_of(row: int, column: int) -> int:
    """Who holds an element: metal/fragment.h has the inverse."""
    return 16 * (row >> 2) + 8 * (column >> 2) + 4 * ((row >> 1) & 1) + 2 * (row & 1) + ((column >> 1) & 1)


def text(x: float, y: float, content: object, *, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL}" fill="{fill}" stroke="#555"/>'


def matrix(left: float, top: float) -> Iterator[str]:
    """The 32 lanes of an 8x8 matrix; each holds two neighbours of a row."""
    yield text(left + 4 * CELL, top - 26, "an 8x8 matrix: the lane that holds each pair")
    for row in range(8):
        yield text(left - 14, top + row * CELL + 22, row)
        for column in range(0, 8, 2):
            lane, x, y = lane_of(row, column), left + column * CELL, top + row * CELL
            yield box(x, y, 2 * CELL, MARKED if lane == EXAMPLE else COLOURS[(row + column // 2) % 2])
            yield text(x + CELL, y + 22, lane)
    for column in range(8):
        yield text(left + (column + 0.5) * CELL, top - 8, column)


def memory(left: float, top: float, name: str, places: dict[int, str], width: int = 32) -> Iterator[str]:
    """A row of memory; `places` maps elements to what is written on them."""
    cell = 20
    yield text(left, top - 8, name, anchor="start")
    for d in range(width):
        x = left + d * cell
        yield box(x, top, cell, MARKED if d in places else "#fff")
        yield text(x + cell / 2, top + 22, places.get(d, ""), size=10)
    for d in range(0, width + 1, 8):
        yield text(left + d * cell, top + CELL + 14, d, size=10)


def lanes() -> Iterator[str]:
    yield from matrix(40, 60)
    left = 380
    operands = {
        "Q[2], left: fragment j takes elements j and 4 + j": {24 + i: f"{i % 4}" for i in range(8)},
        "K[6] and K[7], transposed right: fragment j takes element j of each": {8 + i: f"{i}" for i in range(4)},
        "V[2], right: fragment j takes elements 2j and 2j + 1": {24 + i: f"{i // 2}" for i in range(8)},
    }
    for i, (name, places) in enumerate(operands.items()):
        yield from memory(left, 70 + i * 95, name, places)
    yield text(left, 345, f"what lane {EXAMPLE} loads of 32 values of d, and for which fragment", anchor="start")


FIGURES = {"lanes": (lanes, 1040, 365)}


def svg(name: str) -> str:
    parts, width, height = FIGURES[name]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<desc>made by docs/figures/draw.py</desc>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *parts(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    for name in FIGURES:
        (HERE / f"{name}.svg").write_text(svg(name), encoding="utf-8")


if __name__ == "__main__":
    main()
