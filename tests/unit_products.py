"""Products on M5's matrix unit: kernels of simulator_unit.metal, and what they give, by numpy. Needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from encoding import decode, encode

SCALARS = {"f16": "half", "bf16": "bfloat", "f32": "float", "i8": "int8_t", "u8": "uchar", "i32": "int"}
M5, OLDER = 10, 9  # families whose layouts differ
INTEGERS = {"i8": np.int8, "u8": np.uint8, "i32": np.int32}


def cut(x: np.ndarray) -> np.ndarray:
    """float64 -> what the unit sees of it as float32."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def multiplied(left: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The unit's order of sums, rounded to float32 at each step."""
    total = start
    for k in range(0, left.shape[1], 16):
        terms = left[:, k : k + 16, None] * right[None, k : k + 16]
        pairs = f32(terms[:, 0::2] + terms[:, 1::2])
        quads = f32(pairs[:, :4] + pairs[:, 4:])
        for j in range(4):
            total = f32(total + quads[:, j])
    return total


def matrix(dtype: str, rows: int, columns: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As the kernel reads it, and in float64 as the unit sees it."""
    if dtype in INTEGERS:
        limits = np.iinfo(np.int16 if dtype == "i32" else INTEGERS[dtype])
        x = generator.integers(limits.min, limits.max, (rows, columns), endpoint=True).astype(INTEGERS[dtype])
        return x, x.astype(np.float64)
    x = encode(generator.standard_normal((rows, columns)), dtype)
    return x, decode(x, dtype)


@dataclass(frozen=True)
class Product:
    types: str  # of left, right and destination
    shape: tuple[int, int, int]  # m, n, k
    left: bool = False  # stored transposed
    right: bool = False
    accumulates: bool = True

    @property
    def name(self) -> str:
        return f"{self.types}_{'x'.join(map(str, self.shape))}_{self.left:d}{self.right:d}{self.accumulates:d}"

    @property
    def instance(self) -> str:
        types = ", ".join(SCALARS[dtype] for dtype in self.types.split("_"))
        numbers = ", ".join(str(int(n)) for n in (*self.shape, self.left, self.right, self.accumulates))
        return f'INSTANTIATE("{self.name}", {types}, {numbers})\n'

    def problem(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Left and right as stored, the destination before, and after."""
        m, n, k = self.shape
        types, generator = self.types.split("_"), np.random.default_rng(seed)
        (a, left), (b, right), (d, start) = (
            matrix(dtype, rows, columns, generator)
            for dtype, rows, columns in zip(types, (m, k, m), (k, n, n), strict=True)
        )
        left, right = (cut(x) if dtype == "f32" else x for x, dtype in zip((left, right), types[:2], strict=True))
        start = start if self.accumulates else np.zeros((m, n))
        if types[2] == "i32":
            after = (left @ right + start).astype(d.dtype)
        else:
            after = encode(multiplied(left, right, start), types[2])
        return (*(np.ascontiguousarray(x.T if flag else x) for x, flag in ((a, self.left), (b, self.right))), d, after)


PRODUCTS = [
    Product("f16_f16_f32", (16, 32, 16), right=True),
    Product("f32_f16_f32", (16, 32, 16)),
    Product("bf16_bf16_f32", (16, 16, 32), right=True),
    Product("f32_bf16_f32", (16, 16, 32)),
    Product("f32_f32_f32", (16, 32, 16), left=True),
    Product("f16_f16_f16", (16, 32, 16), accumulates=False),
    Product("bf16_bf16_bf16", (32, 16, 16), left=True, right=True),
    Product("f16_bf16_f32", (32, 32, 32), left=True),
    Product("i8_i8_i32", (16, 32, 16)),
    Product("u8_u8_i32", (16, 16, 32), right=True),
]


def places(layout: int, product: Product) -> np.ndarray:
    """Column and row, as stored, of all elements of a lane: left, right, destination."""
    lane, found = np.arange(32)[:, None], []
    b = [lane >> bit & 1 for bit in range(5)]
    row, (m, n, k) = 4 * b[4] + 2 * b[2] + b[1], product.shape
    for rows, columns, is_transposed in ((m, k, product.left), (k, n, product.right), (m, n, False)):
        i = np.arange(rows * columns // 32)
        if layout == M5:
            across = (rows if is_transposed else columns) // 16
            tile_row, tile_column = i // 8 // across, i // 8 % across
            x = 16 * tile_column + 8 * b[3] + 4 * b[0] + i % 4
            y = 16 * tile_row + row + 8 * (i // 4 % 2)
        else:
            across = columns // 16
            half, tile = i // (4 * across), i // 4 % across
            x = 16 * tile + 4 * b[3] + 2 * b[0] + np.array([0, 1, 8, 9])[i % 4]
            y = row + 8 * half
            x, y = (y, x) if is_transposed else (x, y)
        found.append(np.stack(np.broadcast_arrays(x, y), axis=-1))
    return np.concatenate(found, axis=1)


def source_of(products: Iterable[Product]) -> str:
    """Metal with a kernel for each, of that name: buffers 0 to 3 are left, right, destination, places of elements."""
    return Path(__file__).with_name("simulator_unit.metal").read_text() + "".join(each.instance for each in products)
