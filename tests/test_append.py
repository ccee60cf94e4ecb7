"""mfa::attention_append: where tokens go and what they become; kernels and PyTorch's operations give the same bits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from rotation import rotated
from serving import DTYPES, moved
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import mfa

CPU = Device("cpu")
INT32 = torch.int32
CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")
FORMATS = (None, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
ORDER = (
    *("query", "key_cache", "value_cache", "key", "value", "cache_lengths", "cache_length"),
    *("block_table", "key_scale", "value_scale"),
    *("rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved", "queries_advance"),
)


@dataclass(frozen=True)
class Problem:
    """Dense without `page`; `rotary` is R, or None; `own_starts`: positions don't follow from lengths.

    `as_number`: the length of all entries, which have the first one's, is not a tensor.
    """

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
    as_number: bool
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
            x = (
                torch.randn(memory, generator=generator)
                * torch.randn(memory[:-1], generator=generator)[..., None].exp()
            )
            return (x.transpose(1, 2) if transposed else x).to(self.dtype)

        named: dict[str, Any] = dict.fromkeys(ORDER)
        named["query"] = fresh(self.transposed[0], batch, heads, self.query_length, self.dims[0])
        named["cache_lengths"] = None if self.as_number else torch.tensor(self.lengths, dtype=INT32)
        named["cache_length"] = self.lengths[0] if self.as_number else 0
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
                named["rotary_seqlens"] = torch.randint(0, 3, (batch,), generator=generator, dtype=INT32)
        named["rotary_interleaved"], named["queries_advance"] = self.interleaved, self.advance
        return named


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    key_heads = draw(st.sampled_from((1, 2, 3)))
    dims = draw(st.sampled_from(((16, 16), (64, 64), (5, 3), (80, 40), (130, 128), (12, 256))))
    form, as_number = st.sampled_from(FORMATS), draw(st.booleans())
    lengths = tuple(draw(st.lists(st.sampled_from((0, 1, 7, 8, 15, 40)), min_size=1, max_size=4)))
    formats = (draw(form), draw(form)) if draw(st.booleans()) else (draw(form),) * 2
    return Problem(
        dtype=draw(st.sampled_from(DTYPES)),
        formats=formats,
        heads=(key_heads * draw(st.sampled_from((1, 2, 4))), key_heads),
        query_length=draw(st.sampled_from((1, 0, 2, 7))),
        new=draw(st.sampled_from((1, 0, 2, 9, 33))),
        lengths=lengths[:1] * len(lengths) if as_number else lengths,
        spare=draw(st.sampled_from((0, 1, 30))),
        page=draw(st.sampled_from((None, 8, 16, 24))),
        dims=dims,
        rotary=draw(
            st.none()
            | st.sampled_from(sorted({2, 4, 6, dims[0] // 4 * 2, dims[0] // 2 * 2})).filter(
                lambda size: size <= dims[0]
            )
        ),
        float_tables=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        advance=draw(st.booleans()),
        own_starts=draw(st.booleans()),
        as_number=as_number,
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


def problem(**options: Any) -> Problem:
    defaults: dict[str, Any] = {
        **{"dtype": torch.float16, "formats": (None, None), "heads": (4, 2), "query_length": 2, "new": 2},
        **{"lengths": (5, 0, 12), "spare": 3, "page": None, "dims": (16, 16), "rotary": 8, "float_tables": True},
        **{
            "interleaved": False,
            "advance": True,
            "own_starts": False,
            "as_number": False,
            "transposed": (False, False),
            "seed": 0,
        },
    }
    return Problem(**{**defaults, **options})


QUANTIZED = (torch.int8, torch.float8_e5m2)


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


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


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


# -- the op in PyTorch's machinery ----------------------------------------------------------------------------------


def as_args(named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named[name] for name in ORDER)


@pytest.mark.parametrize(
    "options",
    [{}, {"page": 8, "formats": (torch.int8,) * 2, "own_starts": True}, {"rotary": None, "transposed": (True, True)}],
)
def test_opcheck(device: Device, options: dict[str, Any]) -> None:
    named = problem(dtype=torch.float32, **options).arguments()
    with device.active():
        opcheck(torch.ops.mfa.attention_append.default, tuple(moved(x, device) for x in as_args(named)))


def test_it_counts_as_a_change_in_place() -> None:
    named = problem(formats=QUANTIZED).arguments()
    before = {name: named[name]._version for name in CACHES}
    torch.ops.mfa.attention_append(*as_args(named))
    assert all(named[name]._version > before[name] for name in CACHES)
    weight = torch.ones(3, 2, 17, 16, requires_grad=True)
    named = problem(dtype=torch.float32, rotary=None).arguments()
    product = (weight * named["key_cache"]).sum()
    torch.ops.mfa.attention_append(*as_args(named))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", ["query", "key_cache", "key", "value", "rotary_cos"])
def test_it_has_no_gradient(name: str) -> None:
    named = problem().arguments()
    kept = named["key_cache"].clone()
    named[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, and attention over a cache has no gradients"):
        torch.ops.mfa.attention_append(*as_args(named))
    assert torch.equal(named["key_cache"], kept)
    with torch.no_grad():
        torch.ops.mfa.attention_append(*as_args(named))
    assert not torch.equal(named["key_cache"], kept)


def test_inference_mode() -> None:
    with torch.inference_mode():
        named = problem().arguments()
        torch.ops.mfa.attention_append(*as_args(named))


def test_vmap_is_refused() -> None:
    named = problem().arguments()
    keys = named["key"].expand(2, *named["key"].shape)

    def append(key: Tensor) -> Tensor:
        return torch.ops.mfa.attention_append(*as_args({**named, "key": key}))[1]

    with pytest.raises(NotImplementedError, match=r"can't be appended to a cache inside torch\.vmap"):
        torch.vmap(append)(keys)


def test_autocast() -> None:
    named = problem(dtype=torch.bfloat16).arguments()
    wide = {name: named[name].float() for name in ("query", "key", "value")}
    expected, results = call(named, CPU)
    with torch.autocast("cpu", dtype=torch.float16):  # a cache isn't cast: what meets it is
        after, found = call({**named, **wide}, CPU)
    for actual, wanted in zip(found, results, strict=True):
        assert_same_bits(actual, wanted)
    assert_same_bits(after["key_cache"], expected["key_cache"])


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"cache_lengths": torch.tensor([5, 0, 16], dtype=INT32)}, "cache_lengths has 16 and 2 new tokens at 2"),
    ({}, {"cache_lengths": torch.tensor([5, 0])}, "cache_lengths has dtype int64"),
    ({}, {"cache_lengths": None, "cache_length": 16}, "cache_length has 16 and 2 new tokens at 0"),
    ({"page": 8}, {"block_table": torch.zeros(3, 3, dtype=INT32)}, "append to the same slot"),
    ({"page": 8}, {"block_table": torch.full((3, 3), 11, dtype=INT32)}, "has page 11 at"),
    ({"formats": QUANTIZED}, {"value_scale": None}, "value_scale is None"),
    ({}, {"key": torch.zeros(3, 2, 2, 8).half()}, "key has shape"),
    ({}, {"value": torch.zeros(3, 2, 2, 16)}, "value has dtype float32"),
    ({}, {"rotary_sin": None}, "rotary_sin is None, and rotary_cos is given"),
    ({}, {"rotary_sin": torch.zeros(22, 3)}, r"rotary_sin has shape \[22, 3\]; it must have that of rotary_cos"),
    ({}, {"rotary_sin": torch.zeros(22, 4).half()}, "rotary_sin has dtype float16; it must have that of rotary_cos"),
    ({}, {"rotary_cos": torch.zeros(22, 4).int()}, "rotary_cos has dtype int32; it must be float16 or float32"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(22, 9)), "rotary_cos has 9 columns; .* half of .* 16"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(13, 4)), "13 positions; .* 2 tokens from 12 on"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(0, 4)), "rotary_cos has 0 positions"),
    ({}, {"rotary_seqlens": torch.tensor([0, 21, 0], dtype=INT32)}, "2 tokens from 21 on, for batch entry 1"),
    ({}, {"rotary_seqlens": torch.tensor([0, -1, 0], dtype=INT32)}, "2 tokens from -1 on"),
    (
        {"rotary": None},
        {"rotary_seqlens": torch.zeros(3, dtype=INT32)},
        "rotary_seqlens is given, and rotary_cos is None",
    ),
]


@pytest.mark.parametrize(("options", "change", "words"), BAD)
def test_a_failed_check_leaves_the_cache(
    device: Device, options: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    if device.name == "mps" and any(word in words for word in ("slot", "page 11", "tokens")):
        pytest.skip("the host doesn't see contents there")
    named = problem(**options).arguments()
    there = {name: moved(x, device) for name, x in {**named, **change}.items()}
    kept = {name: there[name].clone() for name in CACHES if there[name] is not None}
    with (
        device.active(),
        pytest.raises(RuntimeError, match=None if device.name == "mps" else words),
    ):  # C++ says it there
        torch.ops.mfa.attention_append(*as_args(there))
    for name, cache in kept.items():
        assert_same_bits(there[name], cache)


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda named: {"key_cache": named["key_cache"].mT.contiguous().mT}, "key_cache must have a contiguous last"),
        (lambda named: {"value_cache": named["value_cache"][:1].expand(3, -1, -1, -1)}, "value_cache is expanded"),
    ],
)
def test_what_kernels_cant_write_is_refused_before_anything_is_written(change: Any, words: str) -> None:
    named = problem().arguments()
    named |= change(named)
    kept = {name: named[name].clone() for name in CACHES[:2]}
    with mfa.simulate(), pytest.raises(RuntimeError, match=words):
        torch.ops.mfa.attention_append(*as_args(named))
    for name, cache in kept.items():
        assert_same_bits(named[name], cache)


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


# -- mfa.attention_with_kv_cache ------------------------------------------------------------------------------------


def public(named: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of the function."""
    names = ("cache_lengths", "cache_length", "rotary_seqlens", "queries_advance")
    kept = {name: x for name, x in named.items() if name not in names}
    lengths = named["cache_length"] if named["cache_lengths"] is None else named["cache_lengths"]
    return {**kept, "cache_seqlens": lengths, **more}


@pytest.mark.parametrize("terms", [{}, {"is_causal": False, "window": (3, None)}, {"is_causal": False}])
def test_rotary_of_the_function(device: Device, terms: dict[str, Any]) -> None:
    """As with queries and keys that are rotated already."""
    named = problem(interleaved=True, advance=terms != {"is_causal": False}).arguments()
    after, (query, _) = call(named, CPU)
    first = {name: moved(x, device) for name, x in public(named, **terms).items()}
    plain = dict.fromkeys(("rotary_cos", "rotary_sin"))
    second = public(named, **terms) | plain | {"query": query, "key_cache": after["key_cache"]}
    second |= {"value_cache": after["value_cache"], "key": None, "value": None}
    second |= {"cache_seqlens": named["cache_lengths"] + 2, "rotary_interleaved": False}
    second = {name: moved(x, device) for name, x in second.items()}
    with device.active():
        out, expected = (mfa.attention_with_kv_cache(**arguments) for arguments in (first, second))
    assert_same_bits(out.cpu(), expected.cpu())
    assert_same_bits(first["key_cache"].cpu(), after["key_cache"])


class Dispatched(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.simulator
@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("formats", [(None, None), (torch.int8, torch.int8)])
@pytest.mark.parametrize(("rotary", "as_number"), [(None, False), (16, False), (8, True)])
def test_two_launches_from_query_key_value_to_out(
    page: int | None, formats: tuple[torch.dtype | None, ...], rotary: int | None, as_number: bool
) -> None:
    options = {"as_number": True, "lengths": (5, 5, 5)} if as_number else {}
    named = public(problem(page=page, formats=formats, rotary=rotary, spare=60, **options).arguments())
    with Dispatched() as dispatched, mfa.simulate() as simulation:
        mfa.attention_with_kv_cache(**named)
        mfa.attention_with_kv_cache(**named, num_splits=2)
    kernels = [launch.kernel.split("_")[0] for launch in simulation.launches]
    assert kernels == ["append", "decode", "append", "decode", "combine"]
    names = [name for name in dispatched.names if name != "aten.view.default"]  # where the host reads the block table
    assert names == ["mfa.attention_append.default", "mfa.attention_decode.default"] * 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": None, "value": None}, ValueError, "key is None, and rotary_cos is given"),
        ({"rotary_cos": None}, ValueError, "rotary_cos is None, and rotary_sin is given"),
        ({"rotary_cos": [1]}, TypeError, "rotary_cos is of type list"),
        ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved is 1; it must be True or False"),
        ({"cache_seqlens": 14, "query": torch.zeros(3, 4, 9, 16).half()}, ValueError, "9 tokens from 14 on"),
    ],
)
def test_the_function_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    named = public(problem().arguments())
    kept = named["key_cache"].clone()
    with pytest.raises(error, match=words):
        mfa.attention_with_kv_cache(**{**named, **change})
    assert_same_bits(named["key_cache"], kept)


def test_compile_is_done_once_for_all_lengths_and_numbers_of_tokens() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mfa.attention_with_kv_cache, fullgraph=True, dynamic=True, backend=counter)
    for new in (5, 6, 7):
        named = public(problem(dtype=torch.float32, new=new, query_length=new, spare=9 - new).arguments())
        other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
        torch.testing.assert_close(step(**named), mfa.attention_with_kv_cache(**other))
        for name in CACHES[:2]:
            assert_same_bits(named[name], other[name])
    assert counter.frame_count == 1


def test_export() -> None:
    class Step(torch.nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, n: Tensor) -> Tensor:
            return mfa.attention_with_kv_cache(query, keys, values, key, value, cache_seqlens=n)

    named = problem(dtype=torch.float32, rotary=None).arguments()
    names = ("query", "key_cache", "value_cache", "key", "value", "cache_lengths")
    program = torch.export.export(Step(), tuple(named[name].clone() for name in names))
    results = []
    for function in (Step(), program.module()):
        args = tuple(named[name].clone() for name in names)
        results.append((function(*args), *args))
    torch.testing.assert_close(*results)
