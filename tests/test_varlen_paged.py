"""mfa.attention_varlen over pages, against float64 sequence by sequence, and what has to hold exactly."""

import math
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from serving import DTYPES, Cached, cached_problems, dense_terms, dequantized, moved, normal, starts
from strategies import shards
from torch import Tensor

import mfa
from mfa._arguments import Paged
from mfa.simulator import Launch

INT32 = torch.int32
PAGES = ("key", "value", "key_scale", "value_scale")


@dataclass(frozen=True)
class Ragged:
    """Arguments of one `mfa.attention_varlen` with a block table; `cache` says all but the queries' lengths."""

    cache: Cached
    query_lengths: tuple[int, ...]
    spare: int = 0  # queries behind the last sequence

    def arguments(self) -> dict[str, Any]:
        named = self.cache.arguments()
        heads = self.cache.key_heads * self.cache.group
        shape = (sum(self.query_lengths) + self.spare, heads, self.cache.dims[0])
        terms = ("window", "is_causal", "scale", "softcap", "sinks", "alibi_slopes", "block_table", *PAGES[2:])
        return {name: named[name] for name in terms if name in named} | {
            "query": normal(*shape, dtype=self.cache.dtype, seed=self.cache.seed),
            "key": named["key_cache"],
            "value": named["value_cache"],
            "seqused_k": named["cache_seqlens"],
            "cu_seqlens_q": starts(self.query_lengths),
            "cu_seqlens_k": None,
            "max_seqlen_q": max(self.query_lengths),
            "max_seqlen_k": max(self.cache.lengths),
        }


@st.composite
def ragged_problems(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...]) -> Ragged:
    """Prefill and decoding mixed; in half of them, one sequence is long enough to be cut into parts."""
    cache = replace(
        draw(cached_problems(dtypes=dtypes)),
        page=draw(st.sampled_from((8, 16, 24))),
        **dict.fromkeys(("new", "leftpad", "rows", "masked")),
    )
    if draw(st.booleans()):
        dims = draw(st.sampled_from(((16, 16), (33, 20), (64, 64), (80, 80))))
        cache = replace(cache, lengths=(*cache.lengths, draw(st.integers(512, 900))), dims=dims)
    length, count = st.sampled_from((1, 1, 1, 0, 2, 9, 17, 40)), len(cache.lengths)
    query_lengths = draw(st.lists(length, min_size=count, max_size=count))
    # The largest error of few numbers may be small by chance in the SDPA that the rule compares with.
    rows = max(1, sum(query_lengths) * cache.group)
    cache = replace(cache, key_heads=max(cache.key_heads, -(-24 // rows)))
    return Ragged(cache, tuple(query_lengths), draw(st.sampled_from((0, 0, 3))))


def ragged(query_lengths: tuple[int, ...], lengths: tuple[int, ...], spare: int = 0, **options: Any) -> Ragged:
    defaults = {
        "dtype": torch.float32,
        "formats": (None, None),
        "key_heads": 2,
        "group": 2,
        "page": 8,
        "dims": (16, 16),
    }
    cache = Cached(**{**defaults, "lengths": lengths, "query_length": 1, "new": None, **options})
    return Ragged(cache, query_lengths, spare)


def call(named: dict[str, Any], device: Device, order: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    there = {name: moved(x, device) for name, x in named.items()}
    with device.active(seed=order, **options):
        out, lse = mfa.attention_varlen(**there, return_lse=True)
    return out.cpu(), lse.cpu()


def reference(problem: Ragged, named: dict[str, Any], function: Any, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Out [Tq,Hq,Dv] and lse [Hq,Tq] of each sequence, by itself; zero and -inf behind the last one."""
    terms = {name: named[name] for name in ("window", "is_causal", "scale", "softcap")}
    terms |= {name: named[name] for name in ("sinks", "alibi_slopes") if name in named}
    outs, lses, done = [], [], 0
    for n, (count, length) in enumerate(zip(problem.query_lengths, problem.cache.lengths, strict=True)):
        rows = named["query"][done : done + count].transpose(0, 1)[None]
        done += count
        keys, values = (
            dequantized(named[side], named[f"{side}_scale"], named["block_table"], n, range(length))[None]
            for side in ("key", "value")
        )
        tensors = [tensor if dtype is None else tensor.to(dtype) for tensor in (rows, keys, values)]
        out, lse = function(*tensors, **dense_terms(terms, n))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    outs.append(outs[0].new_zeros(problem.spare, *outs[0].shape[1:]))
    lses.append(lses[0].new_full((lses[0].shape[0], problem.spare), -math.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def check(problem: Ragged, device: Device) -> None:
    """The numerics rule for out and lse; and the same result, bit by bit, whatever the order of execution."""
    named = problem.arguments()
    results = [call(named, device, order) for order in ((0, 1) if device.name == "simulator" else (0,))]
    expected = reference(problem, named, oracle.attention, None)
    plain = reference(problem, named, oracle.composition, problem.cache.dtype)
    out, lse = results[0]
    assert out.dtype == problem.cache.dtype
    assert lse.dtype == torch.float32
    for actual, wanted, torchs in zip((out, lse), expected, plain, strict=True):
        assert actual.shape == wanted.shape
        assert oracle.largest_error(actual, wanted) <= oracle.tolerance(torchs, wanted)
    for other in results[1:]:
        torch.testing.assert_close(other, (out, lse), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shard", shards(16, 8))
def test_random_problems(device: Device, shard: int) -> None:
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)

    @seed(shard)
    @settings(max_examples=25)
    @given(ragged_problems(dtypes=dtypes))
    def holds(problem: Ragged) -> None:
        check(problem, device)

    holds()


def test_queries_of_one_length_are_a_batch(device: Device) -> None:
    """The same kernels, and the same bits."""
    for lengths, count in (((70, 9, 600), 3), ((16, 8), 1)):
        named = ragged((count,) * len(lengths), lengths).arguments()
        named["max_seqlen_k"] = named["block_table"].shape[1] * 8
        out, lse = call(named, device)
        there = {name: moved(x, device) for name, x in named.items()}
        query = there["query"].unflatten(0, (len(lengths), count)).transpose(1, 2)
        with device.active():
            batch, batch_lse = mfa.attention_with_kv_cache(
                *(query, there["key"], there["value"]),
                cache_seqlens=there["seqused_k"],
                block_table=there["block_table"],
                return_lse=True,
            )
        assert torch.equal(out, batch.transpose(1, 2).flatten(0, 1).cpu())
        assert torch.equal(lse, batch_lse.transpose(0, 1).flatten(1).cpu())


def test_permuting_the_sequences_permutes_the_output(device: Device) -> None:
    problem = ragged((3, 1, 20), (70, 600, 33))
    named, order = problem.arguments(), (2, 0, 1)
    out, lse = call(named, device)
    rows = torch.cat([torch.arange(3, 4 + 20)[1:], torch.arange(3), torch.tensor([3])])
    named |= {name: named[name][list(order)] for name in ("seqused_k", "block_table")}
    named |= {"query": named["query"][rows], "cu_seqlens_q": starts((20, 3, 1))}
    permuted = call(named, device)
    assert torch.equal(permuted[0], out[rows])
    assert torch.equal(permuted[1], lse[:, rows])


def test_one_sequences_nan_stays_there(device: Device) -> None:
    named = ragged((2, 30, 1), (40, 50, 60)).arguments()
    clean = call(named, device)
    for side in ("key", "value"):
        for page in named["block_table"][1, :7].tolist():
            named[side][page] = math.nan
    out, lse = call(named, device)
    assert out[2:32].isnan().all()
    for rows in (slice(2), slice(32, 33)):
        assert torch.equal(out[rows], clean[0][rows])
        assert torch.equal(lse[:, rows], clean[1][:, rows])


@pytest.mark.parametrize(("query_lengths", "lengths"), [((0, 0), (5, 9)), ((3, 0), (0, 4)), ((0,), (0,))])
def test_nothing_to_see(device: Device, query_lengths: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    named = ragged(query_lengths, lengths, spare=2).arguments()
    out, lse = call(named, device)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    sinks, rows = normal(4), sum(query_lengths)
    lse = call({**named, "sinks": sinks}, device)[1]
    assert torch.equal(lse[:, :rows], sinks[:, None].expand(4, rows))
    assert (lse[:, rows:] == -math.inf).all()


def test_no_sequences(device: Device) -> None:
    named = ragged((2, 1), (5, 9)).arguments()
    named |= {"cu_seqlens_q": torch.zeros(1, dtype=INT32)} | {x: named[x][:0] for x in ("seqused_k", "block_table")}
    out, lse = call({**named, "max_seqlen_q": 0, "max_seqlen_k": 0}, device)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_pages_may_have_any_strides(device: Device) -> None:
    """[pages,page,H,D] memory; and one tensor for keys and values."""
    named = ragged((2, 30, 1), (40, 50, 600)).arguments()
    expected = call(named, device)
    both = torch.stack([named["key"], named["value"]]).transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(call({**named, "key": both[0], "value": both[1]}, device), expected, rtol=0, atol=0)


# -- contents and errors ----------------------------------------------------------------------------------------------


@pytest.mark.simulator
@pytest.mark.parametrize("seed_of_order", [0, 1])
@pytest.mark.parametrize("longest", [600, 60])  # cut into parts, or not
def test_kernels_clamp_bad_contents(seed_of_order: int, longest: int) -> None:
    """What the host can't see on MPS: nothing is read or written out of bounds, and good sequences stay right."""
    problem = ragged((3, 9, 1), (40, 50, longest), spare=2)
    named = problem.arguments()
    good = call(named, Device("simulator"))[0]
    bad: list[dict[str, Any]] = [
        {"block_table": named["block_table"].clone().index_fill_(0, torch.tensor([1]), 2**31 - 1)},
        {"block_table": named["block_table"].clone().index_fill_(0, torch.tensor([1]), -(2**31))},
        {"seqused_k": torch.tensor([40, 2**31 - 1, longest], dtype=INT32)},
        {"seqused_k": torch.tensor([40, -5, 2**31 - 1], dtype=INT32)},
        {"cu_seqlens_q": torch.tensor([0, 3, 12, 2**31 - 1], dtype=INT32)},
        {"cu_seqlens_q": torch.tensor([0, 3, -9, 13], dtype=INT32)},
        {"cu_seqlens_q": torch.tensor([0, 3, 2**31 - 1, -(2**31)], dtype=INT32)},
        {"max_seqlen_q": 0},
        {"max_seqlen_k": 2**30},
        {"max_seqlen_q": 2**30},
    ]
    for change in bad:
        changed = named | change
        terms = {"scale": 0.25, "window_right": 0, "softcap": 0.0, "num_splits": 0}
        arguments = Paged(**{name: (changed | terms).get(name) for name in Paged._fields})
        # No races: starts that fall make sequences overlap.
        with mfa.simulate(checks=("bounds", "uninitialised"), seed=seed_of_order) as simulation:
            out, _ = simulation.call(torch.ops.mfa.attention_varlen_paged.default, *arguments)
        if "max_seqlen_q" not in change and "cu_seqlens_q" not in change:
            torch.testing.assert_close(out[:3], good[:3])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_k": starts((5, 9))}, ValueError, "cu_seqlens_k is given, and block_table too"),
        ({"seqused_k": None}, ValueError, "seqused_k is None; it must be given with block_table"),
        ({"block_table": None}, ValueError, "cu_seqlens_k is None; it must be given unless block_table is"),
        ({"seqused_k": torch.tensor([5, 9])}, TypeError, "seqused_k has dtype int64; it must be int32"),
        ({"seqused_k": torch.tensor([5], dtype=INT32)}, ValueError, r"seqused_k has shape \[1\]; .* \[N\] = \[2\]"),
        ({"seqused_k": torch.tensor([5, 17], dtype=INT32)}, ValueError, "seqused_k is 17 at 1; .* 0 ... 16"),
        ({"seqused_k": torch.tensor([-1, 9], dtype=INT32)}, ValueError, "seqused_k is -1 at 0"),
        ({"max_seqlen_k": 8}, ValueError, "max_seqlen_k is 8; .* that of 1 is 9"),
        ({"max_seqlen_q": 1}, ValueError, "max_seqlen_q is 1; .* that of 0 is 2"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=INT32)}, ValueError, "cu_seqlens_q ends with 4"),
        ({"cu_seqlens_q": torch.tensor([1, 2, 3], dtype=INT32)}, ValueError, "cu_seqlens_q starts with 1"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=INT32)}, ValueError, r"cu_seqlens_q has shape \[0\]"),
        ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table has dtype float32"),
        ({"block_table": torch.zeros(1, 2, dtype=INT32)}, ValueError, r"block_table has shape \[1, 2\]"),
        ({"block_table": torch.full((2, 2), 6, dtype=INT32)}, ValueError, r"page 6 at \[0, 0\]; .* 0 ... 5"),
        ({"key": normal(6, 2, 12, 16), "value": normal(6, 2, 12, 16)}, ValueError, "key has pages of 12 tokens"),
        ({"key": normal(6, 2, 8, 16).half()}, TypeError, "key has dtype float16"),
        ({"value": normal(5, 2, 8, 16)}, ValueError, r"value has shape \[5, 2, 8\] and Dv; .* that of key"),
        ({"key": normal(12, 2, 16)}, ValueError, "key has 3 dimensions; it must have 4"),
        ({"query": normal(3, 3, 16)}, ValueError, "query has 3 heads; .* those of key, 2"),
        ({"query": normal(3, 4, 8)}, ValueError, "key has head dimension 16; .* query, 8"),
        ({"key_scale": normal(6, 2, 8)}, ValueError, "key_scale is given for a key of float32"),
        ({"alibi_slopes": normal(3, 4)}, ValueError, r"alibi_slopes has shape \[3, 4\]; .*\[N,Hq\] = \[2, 4\]"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p is 0.1, and block_table is given"),
        ({"query": normal(3, 4, 16).requires_grad_()}, NotImplementedError, "query requires grad"),
        ({"value": normal(6, 2, 8, 16).requires_grad_()}, NotImplementedError, "value requires grad"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    named = ragged((2, 1), (5, 9)).arguments()
    mfa.attention_varlen(**named)
    with pytest.raises(error, match=words):
        mfa.attention_varlen(**{**named, **change})


def test_only_pages_may_have_eight_bits() -> None:
    query, key = normal(3, 2, 8), normal(5, 2, 8)
    layout = (starts((3,)), starts((5,)), 3, 5)
    with pytest.raises(ValueError, match="value_scale is given without block_table"):
        mfa.attention_varlen(query, key, key, *layout, value_scale=normal(5, 2))
    with pytest.raises(ValueError, match="key_scale is None; it must have a scale for each token of the int8 key"):
        mfa.attention_varlen(**{**ragged((2,), (5,), formats=(torch.int8, None)).arguments(), "key_scale": None})


# -- what the kernels cost --------------------------------------------------------------------------------------------


def measured(problem: Ragged, **terms: Any) -> list[Launch]:
    with mfa.simulate("apple9") as simulation:
        mfa.attention_varlen(**problem.arguments() | terms)
    return simulation.launches


@pytest.mark.simulator
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("query_lengths", "lengths", "group", "rows"),
    [
        ((1, 1, 1), (700, 1500, 2048), 8, 8),
        ((1, 2, 1, 48), (1400, 1300, 2000, 1600), 4, 64),
        ((33, 1, 0, 20), (1400, 2048, 100, 1500), 2, 64),
    ],
)
def test_each_live_page_is_read_once_per_tile_of_rows(
    query_lengths: tuple[int, ...], lengths: tuple[int, ...], group: int, rows: int, dim: int
) -> None:
    problem = ragged(
        query_lengths, lengths, dtype=torch.float16, key_heads=1, group=group, page=16, dims=(dim, dim), is_causal=False
    )
    launches = measured(problem)
    names = [launch.kernel.split("_")[0] for launch in launches]
    assert names == ["tile", "decode", "combine"]
    needed = sum(
        -(-count * group // rows) * -(-length // 16) * 16 * 2 * 2 * dim
        for count, length in zip(query_lengths, lengths, strict=True)
    )
    assert launches[1].counters.device_read_bytes <= 1.15 * needed


@pytest.mark.simulator
def test_eight_bits_halve_what_is_read() -> None:
    problem = ragged((1, 20), (1500, 700), dtype=torch.float16, key_heads=1, group=2, page=16, dims=(128, 128))
    whole = measured(problem)[1].counters.device_read_bytes
    for kind in (torch.int8, torch.float8_e4m3fn):
        quantized = replace(problem, cache=replace(problem.cache, formats=(kind, kind)))
        assert measured(quantized)[1].counters.device_read_bytes <= 0.65 * whole


@pytest.mark.simulator
@pytest.mark.parametrize(("query_lengths", "lengths"), [((1, 30), (40, 50)), ((1,) * 200, (40,) * 200)])
def test_short_caches_take_two_launches(query_lengths: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    names = [launch.kernel.split("_")[0] for launch in measured(ragged(query_lengths, lengths, dtype=torch.float16))]
    assert names == ["tile", "decode"]
