"""mfa::attention_append: where tokens go and what they become; kernels and PyTorch's operations give the same bits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from rotation import rotated
from serving import DTYPES, moved
from torch import Tensor

import mfa

CPU = Device("cpu")
INT32 = torch.int32
CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")
FORMATS = (None, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
ORDER = (
    *("query", "key_cache", "value_cache", "key", "value", "cache_lengths", "block_table", "key_scale", "value_scale"),
    *("rotary_cos", "rotary_sin", "rotary_starts", "rotary_interleaved", "queries_advance"),
)


@dataclass(frozen=True)
class Problem:
    """Dense without `page`; `rotary` is R, or None; `own_starts`: positions don't follow from lengths."""

    dtype: torch.dtype
    formats: tuple[torch.dtype | None, torch.dtype | None]
    heads: tuple[int, int]
    query_length: int
    new: int
    lengths: tuple[int, ...]
    spare: int
    page: int | None
    dims: tuple[int, int]
    rotary: int | None
    float_tables: bool
    interleaved: bool
    advance: bool
    own_starts: bool
    transposed: tuple[bool, bool]  # [B,L,H,D] memory: of query and new tokens, of caches
    seed: int

    @property
    def capacity(self) -> int:
        tokens = max(self.lengths) + self.new + self.spare
        return tokens if self.page is None else -(-tokens // self.page) * self.page

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        batch, (heads, key_heads) = len(self.lengths), self.heads

        def fresh(transposed: bool, *shape: int) -> Tensor:
            memory = (shape[0], shape[2], shape[1], shape[3]) if transposed else shape
            x = torch.randn(memory, generator=generator) * torch.randn(memory[:-1], generator=generator)[..., None].exp()
            return (x.transpose(1, 2) if transposed else x).to(self.dtype)

        named: dict[str, Any] = dict.fromkeys(ORDER)
        named["query"] = fresh(self.transposed[0], batch, heads, self.query_length, self.dims[0])
        named["cache_lengths"] = torch.tensor(self.lengths, dtype=INT32)
        entries, rows = batch, self.capacity
        if self.page is not None:
            per_sequence = self.capacity // self.page
            entries, rows = batch * per_sequence + 2, self.page
            table = torch.randperm(entries, generator=generator)[: batch * per_sequence].view(batch, per_sequence)
            named["block_table"] = table.to(INT32)
            for entry, length in enumerate(self.lengths):  # what no live token needs
                named["block_table"][entry, -(-(length + self.new) // self.page) :] = -7
        for side, dim, form in zip(("key", "value"), self.dims, self.formats, strict=True):
            named[side] = fresh(self.transposed[0], batch, key_heads, self.new, dim)
            cache = fresh(self.transposed[1], entries, key_heads, rows, dim)
            if form is not None:
                cache, named[f"{side}_scale"] = mfa.quantize_kv(cache, form)
            named[f"{side}_cache"] = cache
        if self.rotary is not None:
            positions = self.capacity + self.query_length + 3
            angles = torch.rand(positions, self.rotary // 2, generator=generator, dtype=torch.float64) * 6.3
            dtype = torch.float32 if self.float_tables else self.dtype
            named["rotary_cos"], named["rotary_sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
            if self.own_starts:
                named["rotary_starts"] = torch.randint(0, 3, (batch,), generator=generator, dtype=INT32)
        named["rotary_interleaved"], named["queries_advance"] = self.interleaved, self.advance
        return named


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    key_heads = draw(st.sampled_from((1, 2, 3)))
    dims = draw(st.sampled_from(((16, 16), (64, 64), (5, 3), (80, 40), (130, 128), (12, 256))))
    form = st.sampled_from(FORMATS)
    formats = (draw(form), draw(form)) if draw(st.booleans()) else (draw(form),) * 2
    return Problem(
        dtype=draw(st.sampled_from(DTYPES)),
        formats=formats,
        heads=(key_heads * draw(st.sampled_from((1, 2, 4))), key_heads),
        query_length=draw(st.sampled_from((1, 0, 2, 7))),
        new=draw(st.sampled_from((1, 0, 2, 9, 33))),
        lengths=tuple(draw(st.lists(st.sampled_from((0, 1, 7, 8, 15, 40)), min_size=1, max_size=4))),
        spare=draw(st.sampled_from((0, 1, 30))),
        page=draw(st.sampled_from((None, 8, 16, 24))),
        dims=dims,
        rotary=draw(st.none() | st.sampled_from(sorted({2, 4, 6, dims[0] // 4 * 2, dims[0] // 2 * 2})).filter(
            lambda size: size <= dims[0])),
        float_tables=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        advance=draw(st.booleans()),
        own_starts=draw(st.booleans()),
        transposed=(draw(st.booleans()), draw(st.booleans())),
        seed=draw(st.integers(0, 2**16)),
    )


def call(named: dict[str, Any], device: Device, order: int = 0) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The arguments after the call, and the results, on the CPU. Strides stay."""
    there = {name: moved(x, device).clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    with device.active(seed=order):
        results = torch.ops.mfa.attention_append(*(there[name] for name in ORDER))
    return {name: moved(x, CPU) for name, x in there.items()}, tuple(x.cpu() for x in results)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype.itemsize == 1:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check_rotated(actual: Tensor, x: Tensor, named: dict[str, Any], advance: bool) -> None:
    """Of x [B,H,L,D], against float64: two products and a sum are rounded to float32, and their result to the dtype."""
    starts = named["cache_lengths"] if named["rotary_starts"] is None else named["rotary_starts"]
    rows = starts[:, None] + torch.arange(x.shape[2]) * advance
    tables = named["rotary_cos"], named["rotary_sin"], rows.long()
    exact = rotated(x.transpose(1, 2), *tables, named["rotary_interleaved"]).transpose(1, 2)
    size = 2 * x.double().abs().amax(-1, keepdim=True)  # of a pair's products
    bound = exact.abs() * torch.finfo(x.dtype).eps / 2 + size * 2**-23
    assert ((actual.double() - exact).abs() <= bound).all()
    dim = 2 * named["rotary_cos"].shape[1]
    assert torch.equal(actual[..., dim:], x[..., dim:])


def check(problem: Problem, device: Device) -> None:
    named = problem.arguments()
    after, (rotated_query, lengths) = call(named, device)
    if device.has_kernels:  # the composed operations, bit for bit, in whatever order
        references = [call(named, CPU)]
        references += [call(named, device, order) for order in ((1, 2) if device.name == "simulator" else ())]
        for other, results in references:
            for name in CACHES:
                if named[name] is not None:
                    assert_same_bits(after[name], other[name])
            for actual, expected in zip((rotated_query, lengths), results, strict=True):
                assert_same_bits(actual, expected)
                assert actual.stride() == expected.stride()
    check_against_the_definition(problem, named, after, rotated_query, lengths)


def check_against_the_definition(
    problem: Problem, named: dict[str, Any], after: dict[str, Any], rotated_query: Tensor, lengths: Tensor
) -> None:
    assert lengths.tolist() == [length + problem.new for length in problem.lengths]
    rows = {"key": named["key"], "value": named["value"]}
    if problem.rotary is None:
        assert rotated_query.shape == (0,)
    else:
        check_rotated(rotated_query, named["query"], named, problem.advance)
        # Keys as the op itself rotates them: as queries that advance.
        terms = {"query": named["key"], "queries_advance": True, **dict.fromkeys(CACHES)}
        for side in ("key", "value"):
            terms[f"{side}_cache"] = torch.zeros_like(named[f"{side}_cache"], dtype=problem.dtype)
        rows["key"] = call({**named, **terms}, CPU)[1][0]
        check_rotated(rows["key"], named["key"], named, True)
    table = named["block_table"]
    for side in rows:
        expected = {name: None if named[name] is None else named[name].clone() for name in CACHES}
        fresh, scales = rows[side], None
        if expected[f"{side}_scale"] is not None:
            fresh, scales = mfa.quantize_kv(fresh, expected[f"{side}_cache"].dtype)
        for entry, length in enumerate(problem.lengths):
            for i in range(problem.new):
                token, page = length + i, problem.page
                place = (entry, token) if page is None else (int(table[entry, token // page]), token % page)
                cache = expected[f"{side}_cache"]
                cache.view(torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype)[place[0], :, place[1]] = (
                    fresh.view(torch.uint8) if cache.dtype.itemsize == 1 else fresh
                )[entry, :, i]
                if scales is not None:
                    expected[f"{side}_scale"][place[0], :, place[1]] = scales[entry, :, i]
        for name in (f"{side}_cache", f"{side}_scale"):
            if expected[name] is not None:
                assert_same_bits(after[name], expected[name])
    for name in set(ORDER) - set(CACHES):
        if isinstance(named[name], Tensor):
            assert_same_bits(after[name], named[name])


@pytest.mark.parametrize("shard", range(6))
def test_random_problems(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=40)
    @given(problems())
    def holds(problem: Problem) -> None:
        check(problem, device)

    holds()
