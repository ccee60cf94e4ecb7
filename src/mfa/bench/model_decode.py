"""The cost model of decoding: few queries per head over a long cache, which K and V of the live keys bound.

part    a threadgroup's steps over its part of the keys; parts are dealt evenly to cores
launch  no faster than device memory delivers K and V, once per tile: caches are not relied upon
step    the launch and, where keys are split, that of combine, which reads what the parts wrote
"""

import math
from typing import NamedTuple

from .. import _native
from .chips import Chip
from .kernels import Kernel
from .model import LAUNCH_SECONDS, combined, resident_groups, step_pipes


class Decoding(NamedTuple):
    """A few tokens of each sequence, float16. D = Dv; or D 576 of MLA, whose values are 512 columns of its keys."""

    batch: int
    key_heads: int
    group: int  # query heads per key head
    keys: int  # live ones of each sequence
    head_dim: int
    queries: int = 1  # tokens

    @property
    def rows(self) -> int:
        """That share K and V."""
        return self.group * self.queries

    @property
    def is_latent(self) -> bool:
        return self.head_dim == 576

    @property
    def value_dim(self) -> int:
        return 512 if self.is_latent else self.head_dim

    @property
    def cache_bytes(self) -> int:
        """K and V of the live keys."""
        columns = self.head_dim if self.is_latent else 2 * self.head_dim
        return 2 * self.batch * self.key_heads * self.keys * columns


class Prediction(NamedTuple):
    kernel: str
    splits: int
    seconds: float
    pipes: dict[str, float]  # seconds of each alone
    bound: str


def predict(kernel: Kernel, problem: Decoding, chip: Chip, splits: int) -> Prediction:
    """By a decode kernel; or by a forward kernel, whose tiles have the queries of one head."""
    if kernel.kind == "forward":
        row_tiles = problem.group * math.ceil(problem.queries / kernel.rows)
    else:
        row_tiles = math.ceil(problem.rows / kernel.rows)
    parts = problem.batch * problem.key_heads * row_tiles * splits
    steps = math.ceil(math.ceil(problem.keys / kernel.block) / splits)
    per_core = math.ceil(parts / chip.cores)
    pipes = step_pipes(busy(kernel, problem), chip, resident=min(per_core, resident_groups(kernel)))
    hertz, bandwidth = chip.ghz * 1e9, chip.bandwidth * 1e9
    times = {name: steps * per_core * clocks / hertz for name, clocks in pipes.items()}
    rows = problem.batch * problem.key_heads * problem.rows
    partial = 4 * rows * splits * (problem.value_dim + 1) if splits > 1 else 0
    times["device"] = (row_tiles * problem.cache_bytes + partial) / bandwidth
    seconds = max(steps * per_core * combined(pipes) / hertz, times["device"]) + LAUNCH_SECONDS
    if splits > 1:
        seconds += partial / bandwidth + LAUNCH_SECONDS
    return Prediction(kernel.name, splits, seconds, times, max(times, key=lambda name: times[name]))


def busy(kernel: Kernel, problem: Decoding) -> Kernel:
    """As the kernel, with those of its SIMD-groups that have rows; all of them have the same loads and stores."""
    own = kernel.rows // kernel.simdgroups
    rows = problem.queries if kernel.kind == "forward" else problem.rows
    count = min(kernel.simdgroups, math.ceil(rows / own))
    return kernel._replace(simdgroups=count, threadgroup_read=kernel.threadgroup_read * count // kernel.simdgroups)


def planned(kernels: dict[str, Kernel], problem: Decoding, chip: Chip) -> Prediction:
    """With the kernel and the splits of the plan."""
    plan = _plan(problem, chip)
    return predict(kernels[plan.launches[0].kernel], problem, chip, max(1, plan.params.splits))


def unpacked(kernels: dict[str, Kernel], problem: Decoding, chip: Chip) -> Prediction:
    """With the forward kernel, which the plan takes where it must."""
    plan = _plan(problem, chip, has_correction=True)
    return predict(kernels[plan.launches[0].kernel], problem, chip, 1)


def _plan(problem: Decoding, chip: Chip, **more: object) -> _native.Plan:
    return _native.plan(
        family=chip.family,
        dtype="f16",
        batch=problem.batch,
        query_heads=problem.key_heads * problem.group,
        key_heads=problem.key_heads,
        query_length=problem.queries,
        key_length=problem.keys,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        value_is_key=problem.is_latent,
        scale=problem.head_dim**-0.5,
        **more,
    )


def best(kernels: dict[str, Kernel], problem: Decoding, chip: Chip) -> Prediction:
    """Of all row tiles and numbers of splits that a plan could have."""
    own = (k for k in kernels.values() if k.kind == "decode" and k.head_dim == problem.head_dim)
    tiles = [kernel for kernel in own if chip.has_unit or not kernel.unit_mma]
    most = math.ceil(problem.keys / tiles[0].block)
    choices = sorted({math.ceil(most / blocks) for blocks in range(1, most + 1)})
    return min(
        (predict(kernel, problem, chip, splits) for kernel in tiles for splits in choices),
        key=lambda prediction: prediction.seconds,
    )


def share(problem: Decoding, seconds: float, chip: Chip) -> float:
    """Of the device's bandwidth, that reads each live key and value once."""
    return problem.cache_bytes / seconds / (chip.bandwidth * 1e9)
