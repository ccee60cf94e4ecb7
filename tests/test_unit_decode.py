"""metal/unit/decode.h, decode on M5's matrix unit, in the simulator: right by the numerics rule, without a race; which
problems take it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_attention
import test_kv_cache
import test_latents
import test_varlen_paged
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from serving import Cached, cached_problems
from strategies import Problem, shards
from test_few_queries import few_queries, inputs
from test_latents import Latents
from test_unit_forward import DTYPES, M5
from test_varlen_paged import Ragged, ragged_problems

import mfa

pytestmark = pytest.mark.simulator

TYPES = tuple(DTYPES.values())
# Of a SIMD-group by itself and of teams; some have tails.
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (40, 56), (72, 100))
ROWS = ((1, 1), (1, 3), (1, 8), (2, 8), (5, 3), (5, 8), (20, 1), (20, 3))  # queries, and query heads per key head
TEAMS = ((192, 192), (256, 256), (200, 40), (320, 320), (300, 384), (512, 512))


@st.composite
def caches(draw: st.DrawFn) -> Cached:
    queries, group = draw(st.sampled_from(ROWS))
    problem = draw(cached_problems(dtypes=TYPES))
    return replace(problem, dims=draw(st.sampled_from(DIMS)), query_length=queries, group=group)


@st.composite
def teams(draw: st.DrawFn) -> Cached:
    problem = draw(caches())
    return replace(
        problem,
        dims=draw(st.sampled_from(TEAMS)),
        group=draw(st.sampled_from((3, 8))),
        query_length=draw(st.sampled_from((3, 5))),
    )


@st.composite
def latents(draw: st.DrawFn) -> Latents:
    return replace(draw(test_latents.problems()), dtype=draw(st.sampled_from(TYPES)))


@st.composite
def pages(draw: st.DrawFn) -> Ragged:
    problem = draw(ragged_problems(dtypes=TYPES))
    cache = replace(problem.cache, dims=draw(st.sampled_from(DIMS)), group=draw(st.sampled_from((1, 3, 8))))
    return replace(problem, cache=cache)


@st.composite
def dense(draw: st.DrawFn) -> Problem:
    head_dim, value_dim = draw(st.sampled_from(DIMS))
    problem = draw(few_queries())
    keys = min(problem.key_length, 530)
    return replace(
        problem, dtype=draw(st.sampled_from(TYPES)), head_dim=head_dim, value_dim=value_dim, key_length=keys, batch=1
    )


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[..., None]]] = {
    "cache": (caches(), test_kv_cache.check),
    "teams": (teams(), test_kv_cache.check),
    "latents": (latents(), test_latents.check),
    "pages": (pages(), test_varlen_paged.check),
    "dense": (dense(), test_attention.check),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", shards(6, 1))
def test_random_problems(kind: str, shard: int) -> None:
    strategy, check = KINDS[kind]
    device = M5()

    @seed(shard)
    @settings(max_examples=20)
    @given(strategy)
    def holds(problem: Any) -> None:
        check(problem, device)

    holds()
    assert sum("_unit_" in kernel for kernel in device.kernels if kernel.startswith("decode")) > 10


def launches(family: str = "apple10", **changes: Any) -> list[mfa.Launch]:
    """Of one call with a cache of 640 keys of 64 dimensions in 2 heads."""
    terms = {"rows": 1, "heads": 16, "dtype": torch.float16, "dim": 64} | changes
    tensors = inputs(terms["heads"], 2, terms["rows"], 640, terms["dim"], terms["dtype"])
    with mfa.simulate(family) as simulation:
        mfa.attention_with_kv_cache(*tensors, cache_seqlens=640, is_causal=terms["rows"] == 1, num_splits=1)
    return simulation.launches


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({}, "direct_s1_r1"),  # 8 rows fill a fragment of 8x8
        ({"rows": 2}, "unit_s1_r2"),
        ({"rows": 3}, "unit_s4_r2"),
        ({"rows": 70}, "unit_s4_r2"),
        ({"rows": 3, "dim": 72}, "unit_s4_r2"),
        ({"rows": 3, "dim": 256}, "unit_team_s8_r2"),
        ({"rows": 3, "dtype": torch.float32}, "staged_s8_r1"),
        ({"rows": 3, "family": "apple9"}, "staged_s8_r1"),
    ],
)
def test_what_runs_on_the_unit(changes: dict[str, Any], tile: str) -> None:
    [launch] = launches(**changes)
    assert tile in launch.kernel


def test_heads_with_a_tail_are_decoded_however_many_rows() -> None:
    """Where forward would run in 8x8 matrices: a quarter of the speed."""
    query, key, value = inputs(2, 2, 300, 300, 72)
    with mfa.simulate("apple10") as simulation:
        mfa.attention(query, key, value)
    assert [launch.kernel for launch in simulation.launches] == ["decode_f16_d80_v80_unit_s4_r2_k32"]


def test_block_masks_stay_in_matrices_of_eight() -> None:
    mask = mfa.PackedBlockMask.of(mfa.masks.causal(), (1, 1, 3, 640))
    query, key, value = inputs(16, 2, 3, 640, 64)
    with mfa.simulate("apple10") as simulation:
        mfa.attention(query, key, value, block_mask=mask, enable_gqa=True)
    assert "staged" in simulation.launches[0].kernel


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_cost(dim: int) -> None:
    """Products as the rows need, K and V once per 16 rows, and nothing in threadgroup memory but scores of teams."""
    [launch] = launches(rows=4, dim=dim, dtype=torch.bfloat16)
    rows, keys = 2 * 32, 640  # of both key heads
    counters = launch.counters
    assert counters.unit_mma == rows * keys * 2 * dim // 16**3
    kept = 2 * rows // 16 * keys * dim * 2
    queries = rows * dim * 2
    held = queries if dim == 64 else queries * keys // 32  # else they are read again for every block
    assert kept + held <= counters.device_read_bytes <= 1.01 * (kept + held)
    if dim <= 128:
        assert launch.threadgroup_memory == counters.threadgroup_read_bytes == counters.threadgroup_barriers == 0
    else:
        assert counters.threadgroup_barriers == 2 * 8 * keys // 32
