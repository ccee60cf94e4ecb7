"""MLA: keys are latents of 576 numbers, values the first 512 of each, and all query heads share them."""

from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from plan_problems import CATALOGUE
from serving import FORMATS, dense_terms
from torch import Tensor

import mfa
from mfa import _native as native

D, DV = 576, 512


@dataclass(frozen=True)
class Latents:
    """Queries over a cache of latents, paged or not, of 8 bits or not."""

    dtype: torch.dtype = torch.float16
    kept: torch.dtype | None = None
    heads: int = 16
    queries: int = 1
    lengths: tuple[int, ...] = (100,)  # live latents, per batch entry
    page: int | None = None
    splits: int = 0
    window: tuple[int | None, int | None] = (None, None)
    is_causal: bool = False
    softcap: float = 0.0
    has_sinks: bool = False
    is_odd: bool = False  # rows that aren't aligned
    seed: int = 0

    def arguments(self) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """The query, each entry's live latents as they are kept, in float64, and the call's arguments after it."""
        generator = torch.Generator().manual_seed(self.seed)
        page = self.page or max(1, *self.lengths)
        pages = [-(-length // page) for length in self.lengths] if self.page else [1] * len(self.lengths)
        width = D + 1 if self.is_odd else D
        query = torch.randn(len(self.lengths), self.heads, self.queries, width, generator=generator)
        query = query.to(self.dtype)[..., :D]
        numbers = torch.randn(sum(pages) + 1, 1, page, width, generator=generator).to(self.dtype)[..., :D]
        cache, scale = (numbers, None) if self.kept is None else mfa.quantize_kv(numbers, self.kept)
        wide = cache.double() if scale is None else cache.double() * scale.double()[..., None]
        order = torch.randperm(len(cache), generator=generator) if self.page else torch.arange(len(cache))
        places = order[: sum(pages)].split(pages)
        live = [
            wide[own].transpose(0, 1).flatten(1, 2)[:, :length]
            for own, length in zip(places, self.lengths, strict=True)
        ]
        terms: dict[str, Any] = {"cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32)}
        if self.page:
            table = torch.full((len(pages), max(1, *pages)), 2**31 - 1, dtype=torch.int32)
            for row, own in zip(table, places, strict=True):
                row[: len(own)] = own
            terms["block_table"] = table
        else:
            cache, scale = cache[: len(pages)], None if scale is None else scale[: len(pages)]
        if self.has_sinks:
            terms["sinks"] = torch.randn(self.heads, generator=generator)
        terms |= {"key_cache": cache, "key_scale": scale, "num_splits": self.splits}
        terms |= {"window": self.window, "is_causal": self.is_causal, "softcap": self.softcap}
        return query, live, terms


def call(query: Tensor, terms: dict[str, Any], device: Device, order: int = 0) -> tuple[Tensor, Tensor]:
    with device.active(seed=order):
        own = {name: x.to(device.type) if isinstance(x, Tensor) else x for name, x in terms.items()}
        key, scale = own.pop("key_cache"), own.pop("key_scale")
        results = mfa.attention_with_kv_cache(
            query.to(device.type), key, key[..., :DV], key_scale=scale, value_scale=scale, return_lse=True, **own
        )
        return tuple(x.cpu() for x in results)  # type: ignore[return-value]


def check(problem: Latents, device: Device) -> None:
    """The numerics rule, and the same bits in whatever order of execution."""
    query, live, terms = problem.arguments()
    results = [call(query, terms, device, order) for order in ((0, 1) if device.name == "simulator" else (0,))]
    own = {name: terms[name] for name in ("window", "is_causal", "softcap", "sinks") if name in terms}
    own = dense_terms(own, 0)
    expected, plain = [], []
    for entry, latents in enumerate(live):
        tensors = (query[entry, None], latents[None], latents[None, ..., :DV])
        expected.append(oracle.attention(*tensors, **own))
        plain.append(oracle.composition(*(x.to(problem.dtype) for x in tensors), **own))
    for i, actual in enumerate(results[0]):
        reference, composed = (torch.cat([pair[i] for pair in pairs]) for pairs in (expected, plain))
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(composed, reference)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@st.composite
def problems(draw: st.DrawFn) -> Latents:
    return Latents(
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        kept=draw(st.sampled_from(FORMATS)),
        heads=draw(st.sampled_from((5, 16, 17, 32, 40, 64, 128))),
        queries=draw(st.sampled_from((1, 1, 2, 3))),
        lengths=tuple(draw(st.lists(st.sampled_from((0, 1, 15, 16, 33, 100)), min_size=1, max_size=2))),
        page=draw(st.sampled_from((None, 8, 16))),
        splits=draw(st.sampled_from((0, 1, 3))),
        window=draw(st.sampled_from(((None, None), (None, None), (20, 3), (3, -1)))),
        is_causal=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0))),
        has_sinks=draw(st.booleans()),
        is_odd=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("shard", range(2))
def test_random_problems(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=20)
    @given(problems())
    def holds(problem: Latents) -> None:
        check(problem, device)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(2, 6))
def test_more_random_problems(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=100)
    @given(problems())
    def holds(problem: Latents) -> None:
        check(problem, device)

    holds()


CACHES = [(None, None), (16, None), (None, torch.float8_e4m3fn), (16, torch.int8)]


@pytest.mark.parametrize(("page", "kept"), CACHES)
def test_parts_of_a_long_cache(device: Device, page: int | None, kept: torch.dtype | None) -> None:
    check(Latents(kept=kept, heads=64, lengths=(530,), page=page, seed=1), device)


# Rows whose Q and O a threadgroup has.
TILE = 32


@pytest.mark.simulator
@pytest.mark.parametrize(("heads", "queries"), [(16, 1), (20, 1), (32, 1), (16, 2), (64, 1), (128, 1), (64, 3)])
@pytest.mark.parametrize(("page", "kept"), CACHES)
def test_a_tile_of_rows_reads_each_latent_once(
    heads: int, queries: int, page: int | None, kept: torch.dtype | None
) -> None:
    """Once for all heads, up to 32 rows. Several tiles of a part are next to each other in the grid."""
    problem = Latents(kept=kept, heads=heads, queries=queries, lengths=(512,), page=page, splits=2)
    query, _, terms = problem.arguments()
    with mfa.simulate() as sim:
        call(query, terms, Device("cpu"))
    launch = sim.launches[0]
    tiles = -(-heads * queries // TILE)
    assert launch.constants["value_is_key"]
    assert launch.grid == (tiles, 2, 1)
    latents = 512 * (D * (2 if kept is None else 1) + (0 if kept is None else 4))
    queries_of_parts = 2 * query.numel() * 2
    assert tiles * latents <= launch.counters.device_read_bytes - queries_of_parts <= 1.1 * tiles * latents


@pytest.mark.simulator
@pytest.mark.parametrize(("heads", "rows"), [(8, 16), (16, 16), (24, 32), (32, 32), (48, 64), (64, 64), (72, 96)])
def test_products_are_those_of_whole_row_tiles(heads: int, rows: int) -> None:
    query, _, terms = Latents(heads=heads, lengths=(512,), splits=1).arguments()
    with mfa.simulate() as sim:
        call(query, terms, Device("cpu"))
    assert sim.counters.mma <= rows // 8 * (512 // 8) * (D + DV) // 8


@pytest.mark.simulator
@pytest.mark.parametrize("heads", [16, 128])
def test_prefill_reads_latents_once_per_tile_of_rows(heads: int) -> None:
    queries = 512 // heads
    query, latents = (torch.randn(*shape, dtype=torch.float16) for shape in ((1, heads, queries, D), (1, 1, 256, D)))
    value = latents[..., :DV]
    with mfa.simulate() as sim:
        out = mfa.attention(query, latents, value, enable_gqa=True)
    expected, plain = (f(query, latents, value)[0] for f in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)
    tiles = heads * queries // TILE
    assert sim.counters.device_read_bytes <= 1.05 * (tiles * latents.numel() + query.numel()) * 2


@pytest.mark.parametrize(("dtype", "rows"), [("f16", 32), ("bf16", 32), ("f32", 16)])
@pytest.mark.parametrize("heads", [8, 16, 17, 32, 64, 128])
@pytest.mark.parametrize("queries", [1, 2])
def test_tiles_are_the_smallest_that_hold_the_rows(dtype: str, rows: int, heads: int, queries: int) -> None:
    plan = native.plan(
        **{"dtype": dtype, "query_heads": heads, "query_length": queries, "key_length": 4096},
        **{"key_heads": 1, "head_dim": D, "value_dim": DV, "value_is_key": True, "scale": 0.05},
    )
    launch = plan.launches[0]
    own = 16 if heads * queries <= 16 else rows
    row = CATALOGUE[launch.kernel]
    assert (row.kind, row.head_dim, row.rows) == ("decode", D, own)
    assert launch.grid[0] == -(-heads * queries // own)


def test_values_may_have_scales_of_their_own(device: Device) -> None:
    """Even from the same memory: the first entry's for both."""
    query, live, terms = Latents(kept=torch.int8, lengths=(40, 40)).arguments()
    key, scale = terms.pop("key_cache"), terms.pop("key_scale")
    scales = {"key_scale": scale, "value_scale": scale[:1].expand(2, 1, 40)}
    with device.active():
        moved = {name: x.to(device.type) for name, x in (scales | {"lengths": terms["cache_seqlens"]}).items()}
        lengths, there = moved.pop("lengths"), key.to(device.type)
        out = mfa.attention_with_kv_cache(
            query.to(device.type), there, there[..., :DV], cache_seqlens=lengths, **moved
        ).cpu()
    for entry, latents in enumerate(live):
        values = key[entry, None, ..., :DV].double() * scale[:1, ..., None].double()
        tensors = (query[entry, None], latents[None], values)
        expected = oracle.attention(*tensors)[0]
        plain = oracle.composition(*(x.half() for x in tensors))[0]
        assert oracle.largest_error(out[entry, None], expected) <= oracle.tolerance(plain, expected)
