"""Packed and cached attention problems for hypothesis, and what they must give, sequence by sequence from oracle.py."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conftest import Device
from hypothesis import strategies as st
from torch import Tensor

import mfa

LENGTHS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 65)
# (D, Dv)
DIMS = ((8, 8), (16, 16), (33, 20), (64, 64), (80, 80), (128, 128), (96, 40), (192, 128), (256, 256))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMATS = (None, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST_PRODUCT = 2_000_000  # multiply-accumulates of one matrix product: what the simulator does in milliseconds


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def moved(value: Any, device: Device) -> Any:
    return value.to(device.type) if isinstance(value, Tensor) else value


# -- packed sequences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Arguments of one `mfa.attention_varlen`."""

    dtype: torch.dtype
    key_heads: int
    group: int
    lengths: tuple[tuple[int, int], ...]  # of query and key, per sequence
    spare: tuple[int, int]  # tokens behind the last sequence
    dims: tuple[int, int]
    window: tuple[int | None, int | None] = (None, None)
    is_causal: bool = False
    scale: float | None = None
    softcap: float = 0.0
    has_sinks: bool = False
    alibi: str | None = None  # "heads" or "sequences"
    layout: str = "contiguous"
    uses: str = "all keys"  # or "some": seqused_k is given
    seed: int = 0

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The seven positional arguments, and the others."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.key_heads * self.group
        query_lengths, key_lengths = ([pair[i] for pair in self.lengths] for i in (0, 1))
        tokens = sum(query_lengths) + self.spare[0], sum(key_lengths) + self.spare[1]

        def rows(count: int, heads: int, dim: int) -> Tensor:
            if self.layout == "heads first":
                tensor = torch.randn(heads, count, dim, generator=generator).transpose(0, 1)
            elif self.layout == "of one projection":
                tensor = torch.randn(count, heads, 3 * dim, generator=generator)[..., dim : 2 * dim]
            else:
                tensor = torch.randn(count, heads, dim, generator=generator)
            return tensor.to(self.dtype)

        tensors = (
            rows(tokens[0], heads, self.dims[0]),
            rows(tokens[1], self.key_heads, self.dims[0]),
            rows(tokens[1], self.key_heads, self.dims[1]),
        )
        longest = max(query_lengths, default=0), max(key_lengths, default=0)
        terms: dict[str, Any] = {
            "window": self.window,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        if self.has_sinks:
            terms["sinks"] = torch.randn(heads, generator=generator)
        if self.alibi is not None:
            shape = (heads,) if self.alibi == "heads" else (len(self.lengths), heads)
            terms["alibi_slopes"] = torch.rand(shape, generator=generator)
        if self.uses == "some":
            shares = torch.rand(len(key_lengths), generator=generator)
            terms["seqused_k"] = (shares * (torch.tensor(key_lengths) + 1)).floor().to(torch.int32)
        return (*tensors, starts(query_lengths), starts(key_lengths), *longest), terms  # type: ignore[return-value]


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((usual,) * 3 + others)


def _bounds() -> st.SearchStrategy[tuple[int | None, int | None]]:
    bound = st.none() | st.integers(-40, 40) | st.sampled_from((0, -1, 1))
    return st.just((None, None)) | st.tuples(bound, bound)


@st.composite
def packed_problems(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Packed:
    key_heads, group = draw(_mostly(1, 2)), draw(_mostly(1, 2, 4))
    length = st.sampled_from(LENGTHS)
    lengths = draw(st.lists(st.tuples(length, length), min_size=0, max_size=5))
    pairs = max(1, key_heads * group * sum(a * b for a, b in lengths))
    return Packed(
        dtype=draw(st.sampled_from(dtypes)),
        key_heads=key_heads,
        group=group,
        lengths=tuple(lengths),
        spare=draw(_mostly((0, 0), (3, 0), (0, 5), (9, 9))),
        dims=draw(st.sampled_from([dims for dims in DIMS if dims == DIMS[0] or pairs * max(dims) <= LARGEST_PRODUCT])),
        window=draw(_bounds()),
        is_causal=draw(st.booleans()),
        scale=draw(_mostly(None, 0.0, -0.25, 0.1)),
        softcap=draw(_mostly(0.0, 0.5, 30.0)),
        has_sinks=draw(_mostly(False, True)),
        alibi=draw(_mostly(None, "heads", "sequences")),
        layout=draw(_mostly("contiguous", "heads first", "of one projection")),
        seed=draw(st.integers(0, 2**16)),
    )


def dense_terms(terms: dict[str, Any], index: int) -> dict[str, Any]:
    """What oracle.py takes for one sequence: causal, aligned to the lower right, is a window."""
    terms = dict(terms)
    terms.pop("seqused_k", None)
    if terms.pop("is_causal"):
        left, right = terms["window"]
        terms["window"] = (left, 0 if right is None else min(right, 0))
    slopes = terms.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        terms["alibi_slopes"] = slopes[index]
    return terms


def by_sequence(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Any, ...], terms: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Out [Tq,Hq,Dv] and lse [Hq,Tq] from `function` on each sequence; zero and -inf behind the last one."""
    query, key, value, starts_q, starts_k, *_ = arguments
    outs, lses = [], []
    for n in range(len(starts_q) - 1):
        queries, keys = (slice(int(s[n]), int(s[n + 1])) for s in (starts_q, starts_k))
        if "seqused_k" in terms:
            keys = slice(keys.start, keys.start + int(terms["seqused_k"][n]))
        dense = (x[rows].transpose(0, 1)[None] for x, rows in ((query, queries), (key, keys), (value, keys)))
        out, lse = function(*dense, **dense_terms(terms, n))
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    spare = query.shape[0] - int(starts_q[-1])
    dtypes = (outs[0].dtype, lses[0].dtype) if outs else (query.dtype, torch.float32)
    outs.append(torch.zeros(spare, query.shape[1], value.shape[2], dtype=dtypes[0]))
    lses.append(torch.full((query.shape[1], spare), -math.inf, dtype=dtypes[1]))
    return torch.cat(outs), torch.cat(lses, dim=1)


# -- caches ---------------------------------------------------------------------------------------------------------


def _bad(like: Tensor) -> Tensor:
    return torch.full_like(like, 127 if like.dtype == torch.int8 else math.nan)


@dataclass(frozen=True)
class Cached:
    """Arguments of one `mfa.attention_with_kv_cache`."""

    dtype: torch.dtype
    formats: tuple[torch.dtype | None, torch.dtype | None]  # of K and V; None: the query's dtype
    key_heads: int
    group: int
    lengths: tuple[int, ...]  # in the cache, per batch entry
    query_length: int
    new: int | None  # None: nothing is appended
    page: int | None  # None: dense
    dims: tuple[int, int]
    window: tuple[int | None, int | None] = (None, None)
    is_causal: bool = True
    scale: float | None = None
    softcap: float = 0.0
    has_sinks: bool = False
    alibi: str | None = None  # "heads" or "batches"
    num_splits: int = 0
    leftpad: tuple[int, ...] | None = None  # per batch entry
    rows: tuple[int, ...] | None = None  # the cache's, of each batch entry; of a dense one
    masked: int | None = None  # tokens that a mask is over
    mask_sizes: tuple[bool, bool] = (True, True)  # whether it has a size for batch and heads
    seed: int = 0

    @property
    def capacity(self) -> int:
        needed = max(self.lengths) + (self.new or 0)
        return needed + 3 if self.page is None else -(-needed // self.page) * self.page

    def live(self, entry: int) -> range:
        """Slots, after new tokens were appended."""
        return range(self.leftpad[entry] if self.leftpad else 0, self.lengths[entry] + (self.new or 0))

    def row(self, entry: int) -> int:
        return self.rows[entry] if self.rows else entry

    def arguments(self) -> dict[str, Any]:
        """All arguments; what isn't live in the caches is NaN, or as bad, and in the block table an unused entry."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads = len(self.lengths), self.key_heads * self.group

        def fresh(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        named: dict[str, Any] = {
            "query": fresh(batch, heads, self.query_length, self.dims[0]),
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
            "window": self.window,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "softcap": self.softcap,
            "num_splits": self.num_splits,
        }
        for side, dim in zip(("key", "value"), self.dims, strict=True):
            dense = fresh(batch if self.rows is None else max(self.rows) + 2, self.key_heads, self.capacity, dim)
            scales = None
            kept = self.formats[side == "value"]
            if kept is not None:
                dense, scales = mfa.quantize_kv(dense, kept)
            filled, filled_scales = dense, scales
            dense = _bad(dense)
            scales = None if scales is None else _bad(scales)
            for entry, length in enumerate(self.lengths):
                slots = self.row(entry), slice(None), slice(self.live(entry).start, length)
                dense[slots] = filled[slots]
                if scales is not None and filled_scales is not None:
                    scales[slots] = filled_scales[slots]
            named[f"{side}_cache"], named[f"{side}_scale"] = dense, scales
            if self.new is not None:
                named[side] = fresh(batch, self.key_heads, self.new, dim)
        if self.page is not None:
            self._into_pages(named, generator)
        if self.leftpad is not None:
            named["cache_leftpad"] = torch.tensor(self.leftpad, dtype=torch.int32)
        if self.rows is not None:
            named["cache_batch_idx"] = torch.tensor(self.rows, dtype=torch.int32)
        if self.masked is not None:
            sizes = (n if own else 1 for n, own in zip((batch, heads), self.mask_sizes, strict=True))
            named["attn_mask"] = torch.rand(*sizes, self.query_length, self.masked, generator=generator) < 0.6
        if self.has_sinks:
            named["sinks"] = torch.randn(heads, generator=generator)
        if self.alibi is not None:
            shape = (heads,) if self.alibi == "heads" else (batch, heads)
            named["alibi_slopes"] = torch.rand(shape, generator=generator)
        return named

    def _into_pages(self, named: dict[str, Any], generator: torch.Generator) -> None:
        assert self.page is not None
        batch, per_sequence = len(self.lengths), self.capacity // self.page
        pages = batch * per_sequence + 2
        table = torch.randperm(pages, generator=generator)[: batch * per_sequence].view(batch, per_sequence)
        for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
            dense = named[name]
            if dense is None:
                continue
            pool = _bad(torch.empty(pages, dense.shape[1], self.page, *dense.shape[3:], dtype=dense.dtype))
            for entry in range(batch):
                for index in range(per_sequence):
                    pool[table[entry, index]] = dense[entry, :, index * self.page : (index + 1) * self.page]
            named[name] = pool
        table = table.to(torch.int32)
        for entry, length in enumerate(self.lengths):
            table[entry, -(-(length + (self.new or 0)) // self.page) :] = -7  # never looked at: see api.md
        named["block_table"] = table


def live(cache: Tensor, table: Tensor | None, row: int, slots: range) -> Tensor:
    """Tokens [Hkv,slots,...] of a row of the cache or of the block table, one by one."""
    if table is None:
        return cache[row, :, slots.start : slots.stop]
    page = cache.shape[2]
    tokens = [cache[int(table[row, t // page]), :, t % page] for t in slots]
    return torch.stack(tokens, dim=1) if tokens else cache[0, :, :0]


def dequantized(cache: Tensor, scales: Tensor | None, table: Tensor | None, row: int, slots: range) -> Tensor:
    """As `live`, in float64 if the cache is quantized."""
    rows = live(cache, table, row, slots)
    return rows if scales is None else rows.double() * live(scales, table, row, slots).double()[..., None]


@st.composite
def cached_problems(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Cached:
    key_heads, group = draw(_mostly(1, 2)), draw(_mostly(1, 2, 3, 8))
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3))
    query_length, new = draw(_mostly(1, 2, 5, 20)), draw(st.sampled_from((None, 0, 1, 1, 3)))
    pairs = key_heads * group * query_length * (sum(lengths) + 3 * len(lengths))
    page = draw(st.sampled_from((None, None, 8, 16, 24)))
    pads = None if page else draw(st.none() | st.tuples(*[st.integers(0, length) for length in lengths]))
    rows = st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths), unique=True).map(tuple)
    live = [n + (new or 0) - pad for n, pad in zip(lengths, pads or [0] * len(lengths), strict=True)]
    return Cached(
        dtype=draw(st.sampled_from(dtypes)),
        formats=draw(st.just((None, None)) | st.tuples(*[st.sampled_from(FORMATS)] * 2)),
        key_heads=key_heads,
        group=group,
        lengths=tuple(lengths),
        query_length=query_length,
        new=new,
        page=page,
        dims=draw(st.sampled_from([dims for dims in DIMS if dims == DIMS[0] or pairs * max(dims) <= LARGEST_PRODUCT])),
        window=draw(_bounds()),
        is_causal=draw(_mostly(True, False)),
        scale=draw(_mostly(None, 0.0, -0.25, 0.1)),
        softcap=draw(_mostly(0.0, 0.5, 30.0)),
        has_sinks=draw(_mostly(False, True)),
        alibi=draw(_mostly(None, "heads", "batches")),
        num_splits=draw(_mostly(0, 1, 2, 5)),
        leftpad=pads,
        rows=None if page else draw(st.none() | rows),
        masked=draw(st.none() | st.integers(0, min(live)) | st.just(min(live))),
        mask_sizes=draw(st.tuples(st.booleans(), st.booleans())),
        seed=draw(st.integers(0, 2**16)),
    )
