"""Random attention problems for hypothesis: small, and on the edges of tiles, buckets, masks and layouts."""

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

LENGTHS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 90)
HEAD_DIMS = (1, 8, 16, 24, 31, 32, 33, 40, 63, 64, 65, 72, 73, 80, 81, 96, 100, 127, 128, 129, 160, 192, 200, 255, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("contiguous", "transposed", "padded", "strided", "offset", "one head", "one batch", "one row")
# More random problems than usual, for one run by hand: MFA_TIMES=10.
TIMES = int(os.environ.get("MFA_TIMES", "1"))
# One head of a float32 problem of this many multiply-accumulates takes the simulator about 5 ms.
LARGEST_PRODUCT = 3_000_000


def shards(count: int, unmarked: int) -> list[Any]:
    """Of random problems: numbers for parametrize, of which all but the first are slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= unmarked else []) for n in range(count)]


@dataclass(frozen=True)
class Problem:
    """Arguments of one call; `arguments()` makes the tensors."""

    dtype: torch.dtype
    batch: int
    key_heads: int
    group: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    layouts: tuple[str, str, str]
    window: tuple[int | None, int | None]
    is_causal: bool
    scale: float | None
    softcap: float = 0.0
    bias: tuple[str, tuple[bool, bool, bool, bool]] | None = None  # kind, and which dimensions are broadcast
    has_sinks: bool = False
    alibi: str | None = None  # "heads" or "batches"
    seed: int = 0

    @property
    def query_heads(self) -> int:
        return self.key_heads * self.group

    def arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Query, key, value, and the keyword arguments of `mfa.attention`."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.batch, self.query_heads, self.query_length, self.head_dim),
            (self.batch, self.key_heads, self.key_length, self.head_dim),
            (self.batch, self.key_heads, self.key_length, self.value_dim),
        )
        tensors = tuple(
            laid_out(shape, layout, self.dtype, generator) for shape, layout in zip(shapes, self.layouts, strict=True)
        )
        terms: dict[str, Any] = {
            "window": self.window,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "softcap": self.softcap,
            "attn_mask": self._mask(generator),
            "enable_gqa": self.group > 1,
        }
        if self.has_sinks:
            terms["sinks"] = torch.randn(self.query_heads, generator=generator)
        if self.alibi is not None:
            shape = (self.query_heads,) if self.alibi == "heads" else (self.batch, self.query_heads)
            terms["alibi_slopes"] = torch.rand(shape, generator=generator)
        return tensors, terms  # type: ignore[return-value]

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        if self.bias is None:
            return None
        kind, broadcast = self.bias
        full = (self.batch, self.query_heads, self.query_length, self.key_length)
        shape = [1 if one else size for one, size in zip(broadcast, full, strict=True)]
        hidden = torch.rand(shape, generator=generator) < 0.3
        if kind == "bool":
            return ~hidden
        mask = torch.randn(shape, generator=generator).masked_fill(hidden, -math.inf)
        if kind == "float32":  # finite, and hides its key all the same; float16 has no such number
            mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.1, -1e38)
        return mask.to(torch.float32 if kind == "float32" else self.dtype)


def laid_out(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of this shape with other strides: "one ..." dimensions are expanded, of stride 0."""
    batch, heads, length, dim = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    if layout == "transposed":
        return normal(batch, length, heads, dim).transpose(1, 2)
    if layout == "padded":
        return normal(batch, heads, length, dim + 3)[..., :dim]
    if layout == "strided":
        return normal(batch, heads, length, 2 * dim)[..., ::2]
    if layout == "offset":
        return normal(batch * heads * length * dim + 1)[1:].view(shape)
    if layout == "one head":
        return normal(batch, 1, length, dim).expand(shape)
    if layout == "one batch":
        return normal(1, heads, length, dim).expand(shape)
    if layout == "one row":
        return normal(batch, heads, 1, dim).expand(shape)
    return normal(*shape)


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((usual,) * 3 + others)


@st.composite
def problems(
    draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES, features: bool = True, seeds: int = 2**16
) -> Problem:
    """`features`: everything but windows, causal masks and grouped heads."""
    key_heads, group, batch = draw(_mostly(1, 2)), draw(_mostly(1, 2, 3)), draw(_mostly(1, 2, 3))
    query_length, key_length = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
    pairs = max(1, batch * key_heads * group * query_length * key_length)
    dims = st.sampled_from([dim for dim in HEAD_DIMS if dim == 1 or pairs * dim <= LARGEST_PRODUCT])
    head_dim = draw(dims)
    bound = st.none() | st.integers(-100, 100) | st.sampled_from((0, -1, 1, query_length - key_length))
    optional: dict[str, Any] = {}
    if features:
        optional["softcap"] = draw(_mostly(0.0, 0.5, 30.0))
        kinds = st.tuples(st.sampled_from(("bool", "float32", "query")), st.tuples(*[st.booleans()] * 4))
        optional["bias"] = draw(st.none() | kinds)
        optional["has_sinks"] = draw(_mostly(False, True))
        optional["alibi"] = draw(_mostly(None, "heads", "batches"))
    return Problem(
        dtype=draw(st.sampled_from(dtypes)),
        batch=batch,
        key_heads=key_heads,
        group=group,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=draw(st.just(head_dim) | dims),
        layouts=draw(st.tuples(*[_mostly("contiguous", *LAYOUTS[1:])] * 3)),
        window=draw(_mostly((None, None), *[None] * 2).flatmap(lambda w: st.just(w) if w else st.tuples(bound, bound))),
        is_causal=draw(st.booleans()),
        scale=draw(_mostly(None, 0.0, -1 / math.sqrt(head_dim), 0.5 / math.sqrt(head_dim))),
        seed=draw(st.integers(0, seeds)),
        **optional,
    )
