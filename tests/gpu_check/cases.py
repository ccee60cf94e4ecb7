"""What is checked: problems as plain data, which `build` plans and compiles and `run` runs, maybe elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from unit_products import PRODUCTS

DTYPES = ("f16", "bf16", "f32")


@dataclass(frozen=True)
class Case:
    """A dense problem; packed sequences where `sequences` is set; a cache where `cache` is set, paged for both."""

    group: str
    dtype: str = "f16"
    batch: int = 1
    query_heads: int = 2
    key_heads: int = 1
    query_length: int = 300
    key_length: int = 417
    head_dim: int = 64
    value_dim: int = 0  # 0: as head_dim
    direct: bool = False  # forward: fragments come straight from device memory
    window_left: int | None = None
    window_right: int | None = None  # 0: causal
    softcap: float = 0.0
    bias: str = "none"  # of plan()
    bias_sizes: tuple[int, int, int, int] = (1, 1, 1, 1)  # 0: the problem's own size
    sinks: bool = False
    alibi: bool = False
    dropout_p: float = 0.0
    backward: str = ""  # "": forward only; automatic, five_gemm, seven_gemm
    grad_lse: bool = False
    scratch_limit: int = 64 << 20
    interleaved: bool = False  # [B,L,H,D] in memory
    sequences: int = 0  # packed: of random lengths, query_length and key_length rows in all
    # same_dtype, int8, e4m3, e5m2: key_length is the capacity per entry or sequence, live lengths are random
    cache: str = ""
    page_size: int = 0
    splits: int = 0
    new_tokens: int = 0  # append so many to the cache, instead of attending
    rotary: int = 0  # R of the queries and keys that come with them; pairs are `interleaved`
    heads_checked: int = 0  # 0: all; else so many (batch, key head), the first and the last among them
    family: str = ""  # of the GPU that is planned for; "": that of plan()
    unit_product: str = ""  # instead of attention one product on the matrix unit: its name in unit_products.py

    @property
    def name(self) -> str:
        if self.unit_product:
            return f"{self.group} product {self.unit_product}"
        size = f"B{self.batch} H{self.query_heads}/{self.key_heads} L{self.query_length}x{self.key_length}"
        dims = f"D{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim else "")
        words = [self.group, self.dtype, size, dims]
        for label, value in (
            ("family", self.family or None),
            ("left", self.window_left),
            ("right", self.window_right),
            ("softcap", self.softcap or None),
            ("bias", f"{self.bias}{self.bias_sizes}".replace(" ", "") if self.bias != "none" else None),
            ("dropout", self.dropout_p or None),
            ("sequences", self.sequences or None),
            ("cache", self.cache or None),
            ("page", self.page_size or None),
            ("splits", self.splits or None),
            ("new", self.new_tokens or None),
            ("rotary", self.rotary or None),
            ("backward", self.backward or None),
        ):
            if value is not None:
                words.append(f"{label}={value}")
        words += [name for name in ("direct", "sinks", "alibi", "grad_lse", "interleaved") if getattr(self, name)]
        return " ".join(words)


FEATURES: tuple[dict[str, object], ...] = (
    {"window_right": 0},
    {"window_left": 100, "window_right": 30},
    {"softcap": 20.0, "window_right": 0},
    {"bias": "mask", "bias_sizes": (1, 1, 0, 0)},
    {"bias": "float32", "bias_sizes": (0, 0, 0, 0)},
    {"bias": "same_dtype", "bias_sizes": (1, 0, 0, 1)},
    {"alibi": True, "sinks": True, "window_right": 0},
    {"dropout_p": 0.2},
    {"grad_lse": True, "sinks": True},
    {"value_dim": 40},
)


WIDE = ((320, 320), (500, 400), (512, 512), (576, 512))  # of teams


def small() -> Iterator[Case]:
    """Every kind of kernel at a size that sanitizers can bear."""
    base = Case("small", query_length=77, key_length=131, backward="seven_gemm")
    for dtype, dim in product(DTYPES, (64, 128, 256)):
        yield replace(base, dtype=dtype, head_dim=dim, window_right=0)
    for feature in FEATURES:
        yield replace(base, **feature)  # type: ignore[arg-type]
    for dim in (64, 128, 256):
        yield replace(base, head_dim=dim, backward="five_gemm", key_heads=2)
    for dtype, dim in product(DTYPES, (64, 128)):
        yield replace(base, dtype=dtype, head_dim=dim, direct=True, window_right=0, backward="")
    yield replace(base, sequences=5, query_length=203, key_length=311, window_right=0)
    for dtype, (dim, value_dim) in product(DTYPES, WIDE):
        wide = replace(base, dtype=dtype, head_dim=dim, value_dim=value_dim, window_right=0)
        yield wide
        yield replace(wide, query_length=5, key_length=700, backward="")
    for dim in (320, 512):
        yield replace(base, head_dim=dim, backward="five_gemm", key_heads=2)
    for dtype, dim in product(DTYPES, (64, 128, 512)):
        yield replace(base, dtype=dtype, head_dim=dim, bias="blocks", query_length=300, key_length=417)
    for cache in ("same_dtype", "int8"):
        yield Case("small", batch=3, query_heads=8, key_heads=2, query_length=2, key_length=160, head_dim=512,
                   cache=cache, page_size=16, splits=3, window_right=0)  # fmt: skip
    for feature in FEATURES[:7]:  # few queries
        yield replace(base, query_length=5, key_length=700, backward="", **feature)  # type: ignore[arg-type]
    caches = (("same_dtype", 0), ("same_dtype", 16), ("int8", 16), ("e4m3", 0), ("e5m2", 16))
    for (cache, page), tokens in product(caches, (2, 9)):
        yield Case("small", batch=3, query_heads=8, key_heads=2, query_length=tokens, key_length=160, cache=cache,
                   page_size=page, splits=3, window_right=0)  # fmt: skip
    for cache, tokens in product(("same_dtype", "int8"), (7, 150)):
        yield Case("small", query_heads=8, key_heads=2, query_length=tokens, key_length=608, sequences=5, cache=cache,
                   page_size=16, splits=3, window_right=0)  # fmt: skip

    yield from appended(
        Case("small", batch=3, query_heads=8, key_heads=2, query_length=2, key_length=160, new_tokens=5)
    )


def appended(base: Case) -> Iterator[Case]:
    for (cache, page), dtype in product((("same_dtype", 16), ("int8", 0), ("e4m3", 16), ("e5m2", 0)), DTYPES):
        yield replace(base, cache=cache, page_size=page, dtype=dtype, rotary=32, interleaved=page == 0)
    yield replace(base, cache="same_dtype", head_dim=50, rotary=20)
    yield replace(base, cache="int8")


def features() -> Iterator[Case]:
    base = Case("features", batch=2, query_heads=4, key_heads=2, query_length=600, key_length=733)
    for (dtype, dim), feature in product((("f16", 64), ("bf16", 64), ("f32", 64), ("f16", 128)), FEATURES):
        yield replace(base, dtype=dtype, head_dim=dim, backward="seven_gemm", **feature)  # type: ignore[arg-type]
    for dtype, dim in product(DTYPES, (32, 80, 96, 192, 256)):
        yield replace(base, dtype=dtype, head_dim=dim, window_right=0, backward="automatic")
    for dtype, dim in product(("f16", "bf16"), (64, 128, 256)):
        yield replace(base, dtype=dtype, head_dim=dim, window_right=0, backward="five_gemm")
    for dtype, dim in product(DTYPES, (64, 128)):
        yield replace(base, dtype=dtype, head_dim=dim, direct=True, bias="mask", bias_sizes=(1, 1, 0, 0))
    yield replace(base, query_length=1024, key_length=4096, bias="mask", bias_sizes=(1, 1, 0, 0), backward="automatic")


def full() -> Iterator[Case]:
    for dtype, dim, length, right in product(DTYPES, (64, 128, 256), (2048, 8192), (None, 0)):
        if length == 2048 or dtype == "f16":
            yield Case("full", dtype, 4 if length == 2048 else 1, 8, 8 if length == 2048 else 2, length, length, dim,
                       window_right=right, backward="automatic", heads_checked=4)  # fmt: skip
    for dtype, dim in product(DTYPES, (64, 128, 256)):
        yield Case("full", dtype, 1, 2, 1, 32768, 32768, dim, window_right=0, backward="seven_gemm")
    for dim in (64, 128, 256):
        yield Case("full", "f16", 1, 2, 1, 32768, 32768, dim, window_right=0, backward="five_gemm",
                   scratch_limit=16 << 30)  # fmt: skip
    for dtype, dim in product(DTYPES, (64, 128, 256)):
        yield Case("full", dtype, 1, 1, 1, 131072, 131072, dim, window_right=0)
    yield Case("full", "f16", 1, 2, 1, 131072, 131072, 128, direct=True)
    for dtype, (dim, value_dim) in product(DTYPES, WIDE):
        yield Case("full", dtype, 1, 1, 1, 16384, 16384, dim, value_dim=value_dim, backward="automatic")
    for dtype, dim in product(DTYPES, (64, 128)):
        yield Case("full", dtype, 1, 4, 2, 8192, 8192, dim, bias="blocks", backward="automatic", heads_checked=2)


def huge() -> Iterator[Case]:
    """Offsets of more than 2^31 elements."""
    base = Case("huge", "f16", 1, 320, 320, 131072, 131072, 64, window_left=127, window_right=0, heads_checked=2)
    yield replace(base, backward="seven_gemm")
    yield replace(base, backward="seven_gemm", interleaved=True)
    yield replace(base, direct=True, interleaved=True)
    mask = Case("huge", "f16", 1, 1, 1, 65536, 65536, 64, bias_sizes=(1, 1, 0, 0))
    yield replace(mask, bias="mask", backward="seven_gemm")
    yield replace(mask, bias="same_dtype")
    # dS of four heads: 2^32 elements of scratch.
    yield Case("huge", "f16", 1, 4, 1, 32768, 32768, 64, backward="five_gemm", scratch_limit=16 << 30)


def packed() -> Iterator[Case]:
    base = Case("varlen", "f16", 1, 4, 2, 400_000, 400_000, 64, sequences=4000, heads_checked=1500)
    base = replace(base, backward="seven_gemm")
    yield replace(base, window_right=0)
    yield replace(base, dtype="bf16", head_dim=128, key_length=500_000)
    yield replace(base, dtype="f32", query_length=100_000, key_length=100_000, sequences=1000, window_right=0)


def caches() -> Iterator[Case]:
    base = Case("decode", "f16", 64, 32, 8, 1, 32768, 128, cache="same_dtype", window_right=0, heads_checked=24)
    for cache, page in product(("same_dtype", "int8", "e4m3"), (0, 16)):
        yield replace(base, cache=cache, page_size=page)
    yield replace(base, dtype="bf16", query_length=4, page_size=64, splits=7)
    yield replace(base, dtype="f32", head_dim=64, page_size=16)
    yield replace(base, batch=1, key_length=131072, page_size=16)
    yield from appended(replace(base, query_length=4, new_tokens=4))
    yield from appended(replace(base, batch=4, query_length=2000, key_length=4096, new_tokens=2000))
    for heads in (16, 128):
        yield replace(base, batch=4, query_heads=heads, key_heads=1, key_length=131072, head_dim=576, value_dim=512)
    ragged = replace(base, batch=1, sequences=48, query_length=3000, key_length=16384, page_size=16)
    for cache, dim in product(("same_dtype", "int8"), (64, 128, 256)):
        yield replace(ragged, cache=cache, head_dim=dim, splits=5)
    yield replace(ragged, dtype="bf16", sequences=2, query_length=5, key_length=131072)


def repeated() -> Iterator[Case]:
    """Run fifty times: the same bits."""
    base = Case("repeat", "f16", 2, 8, 4, 1500, 1700, 64, window_right=0)
    yield replace(base, backward="seven_gemm", dropout_p=0.1, bias="float32", bias_sizes=(1, 0, 0, 0))
    yield replace(base, backward="five_gemm")
    yield replace(base, dtype="bf16", head_dim=128, backward="five_gemm")
    yield replace(base, dtype="f32", backward="seven_gemm")
    yield replace(base, direct=True)
    yield replace(base, batch=1, query_length=20_000, key_length=20_000, sequences=100, backward="seven_gemm")
    yield Case("repeat", "f16", 8, 32, 8, 1, 8192, 128, cache="int8", page_size=16, window_right=0)


UNIT_DIMS = (64, 80, 96, 128)
UNIT_WIDE = ((192, 128), (192, 192), (256, 256))


def unit() -> Iterator[Case]:
    """On M5's matrix unit, at sizes that sanitizers can bear: the products themselves, each kernel, features."""
    for each in PRODUCTS:
        yield Case("unit", unit_product=each.name)
    base = Case("unit", family="apple10", query_length=77, key_length=131, backward="seven_gemm")
    for dtype, dim in product(("f16", "bf16"), UNIT_DIMS):
        yield replace(base, dtype=dtype, head_dim=dim, window_right=0)
    for dtype, feature in product(("f16", "bf16"), FEATURES):
        yield replace(base, dtype=dtype, **feature)  # type: ignore[arg-type]
    for dtype, (dim, value_dim) in product(("f16", "bf16"), (*UNIT_WIDE, (384, 384), *WIDE)):
        yield replace(base, dtype=dtype, head_dim=dim, value_dim=value_dim, window_right=0)
    for (dim, value_dim), feature in product(UNIT_WIDE, FEATURES[1:-1]):
        yield replace(base, head_dim=dim, value_dim=value_dim, **feature)  # type: ignore[arg-type]
    for dim in (*UNIT_DIMS, 192, 256):
        yield replace(base, head_dim=dim, bias="blocks", query_length=300, key_length=417)
        yield replace(base, head_dim=dim, sequences=5, query_length=203, key_length=311, window_right=0)

    caches = (("same_dtype", 0), ("same_dtype", 16), ("int8", 16), ("e4m3", 0), ("e5m2", 16))
    decode = Case(
        "unit", family="apple10", batch=3, query_heads=8, key_heads=2, key_length=160, window_right=0, splits=3
    )
    for (cache, page), tokens, dtype in product(caches, (4, 9), ("f16", "bf16")):
        yield replace(decode, dtype=dtype, query_length=tokens, cache=cache, page_size=page)
    for dim, value_dim in ((80, 80), (100, 72), (128, 128), (192, 192), (256, 256), (320, 320), (512, 512), (576, 512)):
        yield replace(decode, query_length=9, cache="same_dtype", head_dim=dim, value_dim=value_dim)


def unit_full() -> Iterator[Case]:
    """The same at full size."""
    for dtype, dim, length, right in product(("f16", "bf16"), UNIT_DIMS, (2048, 8192), (None, 0)):
        batch, key_heads = (4, 8) if length == 2048 else (1, 2)
        yield Case("unit_full", dtype, batch, 8, key_heads, length, length, dim, window_right=right,
                   backward="automatic", heads_checked=4, family="apple10")  # fmt: skip
    for dtype, (dim, value_dim) in product(("f16", "bf16"), (*UNIT_WIDE, *WIDE)):
        yield Case("unit_full", dtype, 1, 1, 1, 8192, 8192, dim, value_dim=value_dim, backward="automatic",
                   family="apple10")  # fmt: skip
    decode = Case("unit_full", "f16", 16, 32, 4, 6, 32768, 128, cache="same_dtype", window_right=0, heads_checked=8,
                  family="apple10")  # fmt: skip
    for dtype, (cache, page), dim in product(("f16", "bf16"), (("same_dtype", 16), ("int8", 0)), (64, 128, 256)):
        yield replace(decode, dtype=dtype, cache=cache, page_size=page, head_dim=dim)
    yield replace(decode, batch=2, query_heads=128, key_heads=1, query_length=1, head_dim=576, value_dim=512)


GROUPS = {
    "small": small,
    "repeat": repeated,
    "decode": caches,
    "varlen": packed,
    "features": features,
    "full": full,
    "huge": huge,
    "unit": unit,
    "unit_full": unit_full,
}
