"""Dropout's random numbers: those of metal/dropout.h, bit for bit, and the state that they start from.

A decision depends on the state and on the absolute (batch, head, query, key) alone, so forward and backward agree, and
so do all devices and all ways to cut a problem. Philox4x32-7 (Salmon et al. 2011) makes sixteen bits for each of eight
keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # tests/gpu_check loads this file by itself
    from .._arguments import Dense

KEYS = 8  # per call of Philox
_DRAWS = 1 << 16
_WORD = 0xFFFFFFFF
_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_STATE_BOUND = (1 << 31) - 1  # that every device's randint can do

# Scratch of `keep_factors` with what it returns, in matrices of float32 scores.
COPIES = 4


def new_state(device: torch.device) -> Tensor:
    """(seed, offset), int64 [2], from the device's default generator: no host sync, and torch.compile can trace it."""
    return torch.randint(_STATE_BOUND, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """How many of 65536 draws drop: the nearest to `dropout_p`, halves up, as in C++; but never all."""
    exact = dropout_p * _DRAWS
    below = math.floor(exact)
    return min(below + (exact - below >= 0.5), _DRAWS - 1)


def keep_factors(
    rng_state: Tensor, heads: Tensor, rows: slice, keys: slice, dropout_p: float, dtype: torch.dtype
) -> Tensor:
    """What dropout multiplies probabilities by: 0, or the reciprocal of the share that is kept.

    Args:
        rng_state: int64 [2] on the CPU, (seed, offset).
        heads: int64 of any shape, batch * Hq + head.
        rows, keys: ranges of queries and of keys.

    Returns:
        [*heads.shape, rows, keys] in `dtype`.
    """
    dropped = threshold(dropout_p)
    columns = torch.arange(keys.start // KEYS, -(-keys.stop // KEYS))
    words = _philox(rng_state, columns, torch.arange(rows.start, rows.stop)[:, None], heads[..., None, None])
    halves = [half >= dropped for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = torch.stack(halves, dim=-1).flatten(-2)
    first = keys.start % KEYS
    return kept[..., first : first + keys.stop - keys.start].to(dtype).mul_(_DRAWS / (_DRAWS - dropped))


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call of the CPU implementation."""

    rng_state: Tensor
    dropout_p: float
    query_heads: int
    dtype: torch.dtype  # of the scores
    first_batch: int = 0  # what the first one counts as: of a packed sequence, its number

    @classmethod
    def of(cls, arguments: Dense, first_batch: int = 0) -> Dropout | None:
        """None if nothing is dropped."""
        rng_state, query = arguments.rng_state, arguments.query
        if rng_state is None or threshold(arguments.dropout_p) == 0:
            return None
        dtype = torch.promote_types(query.dtype, torch.float32)
        return cls(rng_state, arguments.dropout_p, query.shape[1], dtype, first_batch)

    def factors(self, batches: slice, heads: slice, rows: slice, keys: slice) -> Tensor:
        """`keep_factors` of a block [batches,heads,rows,keys]."""
        batch = torch.arange(batches.start, batches.stop)[:, None] + self.first_batch
        head = torch.arange(heads.start, heads.stop, heads.step or 1)
        return keep_factors(self.rng_state, batch * self.query_heads + head, rows, keys, self.dropout_p, self.dtype)

    def of_block(self, batches: slice, heads: slice, rows: slice, spans: tuple[slice, ...]) -> Tensor:
        """`factors` of keys that lie in several ranges, one behind the other."""
        return torch.cat([self.factors(batches, heads, rows, keys) for keys in spans], -1)


def all_factors(arguments: Dense, first_batch: int = 0) -> Tensor | None:
    """What dropout multiplies all probabilities of a call by, on its device; None if nothing is dropped.

    Returns:
        [B,Hq,Lq,Lk] in the dtype of the scores.
    """
    query, rng_state = arguments.query, arguments.rng_state
    on_cpu = arguments._replace(rng_state=None if rng_state is None else rng_state.cpu())
    dropout = Dropout.of(on_cpu, first_batch)
    if dropout is None:
        return None
    batch, heads, length, _ = query.shape
    keys = slice(0, arguments.key.shape[2])
    return dropout.factors(slice(0, batch), slice(0, heads), slice(0, length), keys).to(query.device)


def _philox(rng_state: Tensor, column: Tensor, row: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits in int64, for the counter (column, row, head, offset); the three are broadcast."""
    seed, offset = rng_state.tolist()
    a, b, c, d = column, row, head & _WORD, torch.tensor(offset & _WORD)
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2^64
        a, b, c, d = (
            (right >> 32 & _WORD) ^ b ^ keys[0],
            right & _WORD,
            (left >> 32 & _WORD) ^ d ^ keys[1],
            left & _WORD,
        )
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return a, b, c, d
