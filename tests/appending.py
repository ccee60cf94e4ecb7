"""Arguments of mfa::attention_append, at random and by name, and calls with them."""

from dataclasses import dataclass
from typing import Any

import torch
from conftest import Device
from hypothesis import strategies as st
from serving import DTYPES, moved
from torch import Tensor

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
QUANTIZED = (torch.int8, torch.float8_e5m2)


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


def as_args(named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named[name] for name in ORDER)


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


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
