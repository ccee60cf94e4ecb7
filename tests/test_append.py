"""mfa::attention_append: where tokens go and what they become; kernels and PyTorch's operations give the same bits."""

from typing import Any

import pytest
import torch
from appending import (
    CACHES,
    CPU,
    INT32,
    ORDER,
    QUANTIZED,
    Problem,
    as_args,
    assert_same_bits,
    bits,
    call,
    problem,
    problems,
)
from conftest import Device
from hypothesis import given, seed, settings
from rotation import rotated
from serving import DTYPES, moved
from torch import Tensor

import mfa


def check_rotated(actual: Tensor, x: Tensor, named: dict[str, Any], advance: bool) -> None:
    """Of x [B,H,L,D], against float64: two products and a sum are rounded to float32, and their result to the dtype."""
    starts = named["rotary_seqlens"]
    if starts is None:
        starts = named["cache_lengths"]
    if starts is None:
        starts = torch.full((x.shape[0],), named["cache_length"])
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


@pytest.mark.parametrize("strides", ["sliced", "columns", "one pool"])
@pytest.mark.parametrize("formats", [(None, None), QUANTIZED])
def test_strided_caches_and_inputs(device: Device, strides: str, formats: tuple[torch.dtype | None, ...]) -> None:
    """Views of larger tensors: what lies between their elements is not touched."""
    named = problem(formats=formats, page=8).arguments()
    expected, results = call(named, CPU)
    there = {name: moved(x, device) for name, x in named.items()}
    wholes = {}
    for name in (*CACHES, "query", "key", "value", "rotary_cos", "rotary_sin"):
        x = there[name]
        if x is None:
            continue
        filler = torch.full((*(2 * size for size in x.shape[:-1]), x.shape[-1] + 3), 99.0).to(x.dtype).to(x.device)
        if strides == "sliced":
            view = filler[tuple(slice(1, None, 2) for _ in x.shape[:-1])][..., 2:-1]
        elif strides == "columns":
            last = x.shape[-1]
            if name in CACHES[:2]:  # kernels write rows of contiguous elements
                view = filler[tuple(slice(size) for size in x.shape[:-1])][..., :last]
            else:
                filler = filler.transpose(-1, -2).contiguous().transpose(-1, -2)
                view = filler[tuple(slice(size) for size in x.shape)]
        else:
            view = filler.flatten()[1 : 1 + x.numel()].view(x.shape)
        bits(view).copy_(bits(x))
        wholes[name], there[name] = (filler, view), view
    clones = {name: filler.clone() for name, (filler, _) in wholes.items()}
    with device.active():
        found = torch.ops.mfa.attention_append(*(there[name] for name in ORDER))
    for actual, wanted in zip(found, results, strict=True):
        assert_same_bits(actual.cpu(), wanted)
    for name, (filler, view) in wholes.items():
        if name in CACHES:
            assert_same_bits(view.cpu(), expected[name])
            place = view.storage_offset()
            same = clones[name].as_strided(view.shape, view.stride(), place)
            bits(same).copy_(bits(view))
        assert_same_bits(filler.cpu(), clones[name].cpu())


@pytest.mark.parametrize("formats", [(None, None), QUANTIZED, (torch.float8_e4m3fn,) * 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number(device: Device, formats: tuple[torch.dtype | None, ...], dtype: torch.dtype) -> None:
    """Zeros, the smallest and largest numbers, infinities and NaN; and every 16-bit number."""
    named = problem(dtype=dtype, formats=formats, new=64, dims=(128, 128), lengths=(0, 3), rotary=None).arguments()
    for side in ("key", "value"):
        x = named[side]
        if dtype.itemsize == 2:
            values = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
            values = values[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
            x.copy_(values[: x.numel()].view(x.shape).nan_to_num(0, 0, 0))
            # Ties: multiples of half of the step that the format has at a row's scale.
            x[0, 0] = (torch.arange(64 * 128) % 509 - 254).view(64, 128) / 2
            x[0, 0, :, 0] = 127
        x[1, 0, 0] = 0
        x[1, 0, 1] = torch.finfo(dtype).smallest_normal
        x[1, 0, 2] = torch.finfo(dtype).max
        x[1, 0, 3, 5] = torch.inf
        x[1, 0, 4, 7] = torch.nan
        x[1, 0, 5, 9] = -torch.inf
    for actual, expected in zip(call(named, device), call(named, CPU), strict=True):
        for name in CACHES if isinstance(actual, dict) else ():
            if actual[name] is not None:  # which NaN it is, nobody says
                floats = [x[name].float() for x in (actual, expected)]
                torch.testing.assert_close(*floats, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(*(torch.signbit(x) & ~x.isnan() for x in floats))


@pytest.mark.simulator
@pytest.mark.parametrize("page", [None, 8])
def test_contents_that_the_host_does_not_see_are_clamped(page: int | None) -> None:
    """As a GPU meets them: whatever index tensors hold, nothing but elements of the tensors is touched."""
    named = problem(page=page, formats=QUANTIZED, own_starts=True, lengths=(5, 0, 12, 3, 7, 1)).arguments()
    extremes = [-(2**31), -1, 0, 1000, 2**31 - 1, 2**31 - 2]
    for name in ("cache_lengths", "block_table", "rotary_seqlens"):
        if named[name] is not None:
            bad = torch.tensor(extremes, dtype=INT32)
            named[name].copy_(bad if named[name].dim() == 1 else bad[:, None].expand(named[name].shape))
    with mfa.simulate(checks=("bounds",)) as simulation:
        _, lengths = simulation.call(torch.ops.mfa.attention_append.default, *as_args(named))
    assert lengths.min() == 2
    assert lengths.max() == named["key_cache"].shape[2] * (1 if page is None else named["block_table"].shape[1])
