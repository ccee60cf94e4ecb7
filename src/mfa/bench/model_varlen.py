"""The cost model of packed sequences: the forward kernels of dense batches, on tiles in the order of tile_map.h."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from .. import _native
from .chips import Chip
from .kernels import Kernel
from .model import (
    BARRIER_LATENCY,
    DEVICE_LATENCY,
    LAUNCH_SECONDS,
    Problem,
    predict_tiles,
    tensor_bytes,
    tiles,
)

# tile_map's clocks: its classes, each with two walks over the lengths and four barriers, on one core.
MAP_CLOCKS = 31 * (2 * DEVICE_LATENCY + 4 * BARRIER_LATENCY)


class Packed(NamedTuple):
    """Self-attention of packed sequences, float16, D = Dv."""

    heads: int
    lengths: tuple[int, ...]
    head_dim: int
    causal: bool = False

    @property
    def sequences(self) -> list[Problem]:
        return [Problem(1, self.heads, length, self.head_dim, self.causal) for length in self.lengths]

    @property
    def operations(self) -> int:
        """Floating-point operations of the two products."""
        return sum(sequence.operations(2) for sequence in self.sequences)


def work(kernel: Kernel, sequences: Sequence[Problem]) -> list[tuple[float, int]]:
    """Threadgroups of all heads: heads are adjacent, and of a causal sequence the last tile comes first."""
    return [
        tile
        for sequence in sequences
        for tile in (reversed(list(tiles(kernel, sequence))) if sequence.causal else tiles(kernel, sequence))
        for _ in range(sequence.heads)
    ]


def by_class(sequences: Sequence[Problem]) -> list[Problem]:
    """As tile_map deals them: the longest first, by the binary digits of their lengths."""
    return sorted(sequences, key=lambda sequence: sequence.length.bit_length(), reverse=True)


def seconds(kernel: Kernel, sequences: Sequence[Problem], chip: Chip) -> float:
    """Of tile_map, and of the forward kernel on sequences that start in this order."""
    moved = sum(tensor_bytes(sequence, 4) for sequence in sequences)
    forward = predict_tiles(kernel, work(kernel, sequences), chip, moved).seconds
    return MAP_CLOCKS / (chip.ghz * 1e9) + LAUNCH_SECONDS + forward


def planned(kernels: dict[str, Kernel], packed: Packed, chip: Chip) -> Kernel:
    """The kernel of the plan."""
    tokens = sum(packed.lengths)
    plan = _native.plan(
        family=chip.family,
        dtype="f16",
        query_heads=packed.heads,
        key_heads=packed.heads,
        query_length=tokens,
        key_length=tokens,
        head_dim=packed.head_dim,
        value_dim=packed.head_dim,
        sequences=len(packed.lengths),
        window_right=0 if packed.causal else None,
    )
    return kernels[plan.launches[-1].kernel]


def spread(count: int, longest: int) -> tuple[int, ...]:
    """So many lengths from 1 to `longest`, evenly spaced, in an order that is neither rising nor falling."""
    even = [1 + round(i * (longest - 1) / (count - 1)) for i in range(count)]
    return tuple(itertools.chain.from_iterable(zip(even[: count // 2], even[count // 2 :], strict=True)))
