"""Few queries over many keys: one plan, whichever function poses the problem, and each key and value read once."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from strategies import DTYPES, LARGEST_PRODUCT, LAYOUTS, Problem, shards
from test_attention import check
from torch import Tensor

import mfa
from mfa import sdpa
from mfa.simulator import Launch

pytestmark = pytest.mark.simulator
GENERATIONS = ("apple7", "apple9")
DIMS = (16, 40, 64, 65, 80, 96, 100, 128, 192, 256)


@st.composite
def few_queries(draw: st.DrawFn) -> Problem:
    """Every feature; mostly so many keys that they are split."""

    def mostly(usual: Any, *others: Any) -> Any:
        return draw(st.sampled_from((usual,) * 3 + others))

    key_heads, batch, group = mostly(1, 2), mostly(1, 2), draw(st.sampled_from((1, 2, 3, 4, 8)))
    query_length = draw(st.sampled_from((1, 1, 2, 3, 4, 8, 13, 16)))
    key_length = draw(st.integers(512, 640) | st.sampled_from((1, 33, 200, 512)))
    pairs = batch * key_heads * group * query_length * key_length
    dims = st.sampled_from([dim for dim in DIMS if dim == DIMS[0] or pairs * dim <= 4 * LARGEST_PRODUCT])
    head_dim = draw(dims)
    bound = st.none() | st.integers(-20, 700) | st.just(0)
    kinds = st.tuples(st.sampled_from(("bool", "float32", "query")), st.tuples(*[st.booleans()] * 4))
    return Problem(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=batch,
        key_heads=key_heads,
        group=group,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=draw(st.just(head_dim) | dims),
        layouts=(mostly(*LAYOUTS), mostly(*LAYOUTS), mostly(*LAYOUTS)),
        window=draw(st.just((None, None)) | st.tuples(bound, bound)),
        is_causal=mostly(False, True),
        scale=mostly(None, 0.0, -1 / math.sqrt(head_dim)),
        softcap=mostly(0.0, 30.0),
        bias=draw(st.none() | kinds),
        has_sinks=mostly(False, True),
        alibi=mostly(None, "heads", "batches"),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("family", GENERATIONS)
@pytest.mark.parametrize("shard", shards(12, 6))
def test_random_problems(family: str, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=17)
    @given(few_queries())
    def holds(problem: Problem) -> None:
        check(problem, Device("simulator", family))

    holds()


def inputs(
    heads: int, key_heads: int, rows: int, keys: int, dim: int, dtype: torch.dtype = torch.float16, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, rows, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def launches(
    call: Callable[..., Tensor], *tensors: Tensor, family: str = "apple9", **terms: Any
) -> tuple[Tensor, list[Launch]]:
    with mfa.simulate(family) as simulation:
        return call(*tensors, **terms), simulation.launches


def routed(*tensors: Tensor, **terms: Any) -> Tensor:
    with sdpa.enabled():
        return torch.nn.functional.scaled_dot_product_attention(*tensors, **terms)


def pipeline(launch: Launch) -> tuple[object, ...]:
    """And its grid; a cache has lengths of its own."""
    return launch.kernel, launch.grid, launch.group, launch.constants | {"has_key_lengths": False}


@pytest.mark.parametrize("family", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "rows", "keys"),
    [(8, 2, 1, 600), (8, 2, 1, 40), (4, 4, 3, 530), (8, 1, 8, 640), (8, 1, 16, 90), (2, 2, 129, 600), (4, 1, 40, 65)],
)
def test_the_same_problem_is_the_same_launches(
    family: str, dtype: torch.dtype, heads: int, key_heads: int, rows: int, keys: int
) -> None:
    tensors = inputs(heads, key_heads, rows, keys, 64, dtype)
    found = [
        launches(mfa.attention, *tensors, family=family, enable_gqa=True),
        launches(routed, *tensors, family=family, enable_gqa=True),
        launches(mfa.attention_with_kv_cache, *tensors, family=family, cache_seqlens=keys, is_causal=rows == 1),
    ]
    (first, kernels), *others = found
    packed = rows * heads // key_heads <= 128
    expected = ["decode", "combine"] if packed and keys >= 512 else ["decode"] if packed else ["forward"]
    assert [launch.kernel.split("_")[0] for launch in kernels] == expected
    for out, same in others:
        assert [pipeline(launch) for launch in same] == [pipeline(launch) for launch in kernels]
        assert torch.equal(out, first)


@pytest.mark.parametrize("shape", [(1, 1, 1, 600), (2, 1, 1, 600), (2, 1, 3, 600), (2, 8, 3, 600)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float16, torch.float32])
def test_a_mask_takes_no_copy_and_no_launch(shape: tuple[int, ...], kind: torch.dtype) -> None:
    query, key, value = inputs(8, 2, 3, 600, 64, batch=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8
    if kind != torch.bool:
        mask = torch.zeros(shape, dtype=kind).masked_fill(~mask, -math.inf)
    _, kernels = launches(routed, query, key, value, attn_mask=mask, enable_gqa=True)
    assert [launch.kernel.split("_")[0] for launch in kernels] == ["decode", "combine"]
    read = sum(launch.counters.device_read_bytes for launch in kernels)
    of_mask = 2 * 2 * 16 * 600 * mask.element_size()  # of each batch entry and key head, for a tile of 16 rows
    assert read <= 1.15 * 2 * key.nbytes + 2 * of_mask


@pytest.mark.parametrize("keys", [1, 9, 37])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize(("kernel", "rows", "dtype"), [("decode", 2, torch.float16), ("forward", 150, torch.float32)])
def test_past_the_last_key_nothing_is_added(kernel: str, rows: int, dtype: torch.dtype, dim: int, keys: int) -> None:
    """Though fragments from device memory read the last value again: 0 * inf would be NaN."""
    query, key, value = inputs(2, 2, rows, keys, dim, dtype)
    value[:, :, -1, ::3] = math.inf
    out, [launch] = launches(mfa.attention, query, key, value)
    assert launch.kernel.startswith(kernel)
    assert torch.equal(out.isinf(), torch.arange(dim).expand_as(out) % 3 == 0)
    assert not out.isnan().any()


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_a_static_cache_has_no_tokens_for_is_not_read(tokens: int) -> None:
    query, key, value = inputs(8, 2, tokens, 2048, 64)
    live = torch.arange(2048) < 768
    _, kernels = launches(routed, query, key, value, attn_mask=live[None, None, None], enable_gqa=True)
    live_bytes = 2 * key.nbytes * 768 // 2048
    assert kernels[0].counters.device_read_bytes <= 1.35 * live_bytes  # each part reads the queries, and its mask


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.float16, "forward"), (torch.bfloat16, "forward"), (torch.float32, "decode")]
)
def test_training_runs_forward_where_that_leaves_a_correction(dtype: torch.dtype, kernel: str) -> None:
    query, key, value = inputs(2, 2, 4, 100, 64, dtype)
    out, kernels = launches(mfa.attention, query.requires_grad_(), key, value)
    assert kernels[0].kernel.startswith(kernel)
    assert out.requires_grad


def test_dropout_runs_forward() -> None:
    _, kernels = launches(mfa.attention, *inputs(2, 2, 4, 100, 64), dropout_p=0.5)
    assert [launch.kernel.split("_")[0] for launch in kernels] == ["forward"]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_each_key_and_value_is_read_once(group: int, rows: int, dim: int) -> None:
    """Or twice, if they serve more than 64 rows. Parts, and what reads them, count apart."""
    tensors = inputs(2 * group, 2, rows, 2048, dim)
    cache = 2 * tensors[1].nbytes
    _, (decode, combine) = launches(mfa.attention, *tensors, enable_gqa=True, window=(None, 0))
    assert decode.counters.device_read_bytes <= (1.15 if rows * group <= 64 else 2.2) * cache
    assert decode.counters.device_write_bytes + combine.counters.device_read_bytes <= 0.5 * cache
