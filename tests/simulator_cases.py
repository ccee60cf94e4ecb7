"""What each function of the simulator's metal_stdlib computes, stated in numpy; run by test_simulator_msl.py."""
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from encoding import decode, encode

LANES = 32
THREADS = 64
NUMPY = {
    "float": np.float32,
    "half": np.float16,
    "int": np.int32,
    "uint": np.uint32,
    "short": np.int16,
    "ushort": np.uint16,
    "char": np.int8,
    "uchar": np.uint8,
    "long": np.int64,
    "ulong": np.uint64,
}
Expected = Callable[[np.ndarray], np.ndarray]


@dataclass
class Case:
    """`code` computes y[i] from v = x[i]. `expected` maps x to y, both of 64 elements (or 64 rows)."""

    name: str
    input: str
    output: str
    code: str
    expected: Expected
    tolerance: float = 0  # relative; 0: equal bits, NaN for NaN
    width: int = 1  # elements of y per thread
    values: np.ndarray | None = None

    def x(self) -> np.ndarray:
        if self.values is not None:
            return self.values.astype(NUMPY[self.input])
        generator = np.random.default_rng(sum(self.name.encode()))
        dtype = NUMPY[self.input]
        if self.input in ("float", "half"):
            return generator.standard_normal(THREADS).astype(dtype)
        return generator.integers(0 if self.input[0] == "u" else -9, 9, THREADS).astype(dtype)

    def source(self) -> str:
        return (
            f"kernel void k_{self.name}(device const {self.input}* x [[buffer(0)]], device {self.output}* y [[buffer(1)]], "
            "uint i [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {\n"
            f"  {self.input} v = x[i];\n  {self.code}\n}}\n"
        )


def per_group(function: Callable[[np.ndarray], np.ndarray | float], size: int = LANES) -> Expected:
    """Applies to each SIMD-group (or quad): an array of `size`, or one value for all."""

    def expected(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.broadcast_to(function(part), (size,)) for part in x.reshape(-1, size)])

    return expected


def butterfly(operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Reduction by xor 1, 2, 4, ... in the type of x."""

    def reduce(x: np.ndarray) -> np.ndarray:
        step = 1
        while step < len(x):
            x = operation(x, x[np.arange(len(x)) ^ step])
            step *= 2
        return x

    return reduce


def scan(operation: Callable[[np.ndarray, np.ndarray], np.ndarray], identity: int, inclusive: bool) -> Expected:
    def one(x: np.ndarray) -> np.ndarray:
        total, sums = np.array(identity, x.dtype), []
        for value in x:
            before, total = total, operation(total, value)
            sums.append(total if inclusive else before)
        return np.array(sums, x.dtype)

    return one


def moved(source: Callable[[np.ndarray], np.ndarray], size: int = LANES) -> Expected:
    """Lane l gets the value of lane source(l); poison (all ones) from outside the group."""

    def expected(x: np.ndarray) -> np.ndarray:
        lane = np.arange(size)
        index = source(lane)
        inside = (index >= 0) & (index < size)
        poison = np.full(x.itemsize * len(x), 0xFF, np.uint8).view(x.dtype)
        groups = x.reshape(-1, size)[:, np.where(inside, index, 0)].reshape(-1)
        return np.where(np.tile(inside, len(x) // size), groups, poison)

    return expected


def simd_cases() -> list[Case]:
    cases = []
    for type_ in ("float", "half", "int", "uint", "short"):
        for prefix, size in (("simd", 32), ("quad", 4)) if type_ in ("float", "int") else (("simd", 32),):
            a = size // 4

            def add(name: str, arguments: str, expected: Expected, type_: str = type_, prefix: str = prefix) -> None:
                cases.append(
                    Case(f"{prefix}_{name}_{type_}", type_, type_, f"y[i] = {prefix}_{name}({arguments});", expected)
                )

            add("shuffle_xor", f"v, {a}", moved(lambda lane, a=a: lane ^ a, size))
            add("shuffle_up", f"v, {a}", moved(lambda lane, a=a: lane - a, size))
            add("shuffle_down", f"v, {a}", moved(lambda lane, a=a: lane + a, size))
            add("shuffle_rotate_up", f"v, {a}", moved(lambda lane, a=a, size=size: (lane - a) % size, size))
            add("shuffle_rotate_down", f"v, {a}", moved(lambda lane, a=a, size=size: (lane + a) % size, size))
            add("shuffle", f"v, ushort(lane * 3 % {size})", moved(lambda lane, size=size: lane * 3 % size, size))
            add("broadcast", f"v, {a}", moved(lambda lane, a=a: np.full_like(lane, a), size))
            add("broadcast_first", "v", moved(np.zeros_like, size))
            add("sum", "v", per_group(butterfly(np.add), size))
            add("product", "v", per_group(butterfly(np.multiply), size))
            add("min", "v", per_group(np.min, size))
            add("max", "v", per_group(np.max, size))
            for inclusive in (True, False):
                kind = "inclusive" if inclusive else "exclusive"
                add(f"prefix_{kind}_sum", "v", per_group(scan(np.add, 0, inclusive), size))
                add(f"prefix_{kind}_product", "v", per_group(scan(np.multiply, 1, inclusive), size))
            if type_ in ("int", "uint", "short"):
                add("and", "v", per_group(butterfly(np.bitwise_and), size))
                add("or", "v", per_group(butterfly(np.bitwise_or), size))
                add("xor", "v", per_group(butterfly(np.bitwise_xor), size))
    return cases


def vote_cases() -> list[Case]:
    def mask(x: np.ndarray) -> int:
        return sum(int(bit) << lane for lane, bit in enumerate(x > 0))

    ones = np.concatenate([np.ones(40), -np.ones(24)])
    fill_up = per_group(
        lambda x: np.where(
            np.arange(32) % 8 < 3, 2 * x[(np.arange(32) - 3) % 8 + np.arange(32) // 8 * 8], np.roll(x, 3)
        )
    )
    fill_down = per_group(lambda x: np.where(np.arange(32) >= 29, 2 * np.roll(x, -3), np.roll(x, -3)))
    return [
        Case("ballot", "float", "ulong", "y[i] = ulong(simd_ballot(v > 0));", per_group(mask)),
        Case(
            "vote_all",
            "float",
            "int",
            "y[i] = simd_ballot(v > 0).all() * 2 + simd_ballot(v > 0).any();",
            per_group(lambda x: 2 * int(np.all(x > 0)) + int(np.any(x > 0))),
            values=ones,
        ),
        Case("all", "float", "int", "y[i] = simd_all(v > 0);", per_group(lambda x: int(np.all(x > 0))), values=ones),
        Case("any", "float", "int", "y[i] = simd_any(v > 0);", per_group(lambda x: int(np.any(x > 0))), values=ones),
        Case("quad_all_", "float", "int", "y[i] = quad_all(v > 0);", per_group(lambda x: int(np.all(x > 0)), 4)),
        Case("quad_any_", "float", "int", "y[i] = quad_any(v > 0);", per_group(lambda x: int(np.any(x > 0)), 4)),
        Case("is_first", "float", "int", "y[i] = simd_is_first();", per_group(lambda x: np.arange(32) == 0)),
        Case("active", "float", "ulong", "y[i] = ulong(simd_active_threads_mask());", per_group(lambda x: 0xFFFFFFFF)),
        Case("fill_up", "float", "float", "y[i] = simd_shuffle_and_fill_up(v, 2 * v, 3, 8);", fill_up),
        Case("fill_down", "float", "float", "y[i] = simd_shuffle_and_fill_down(v, 2 * v, 3);", fill_down),
        Case(
            "shuffle_vector",
            "float",
            "float",
            "float4 w = simd_shuffle_xor(float4(v, 2 * v, 3, lane), 5); y[i] = w.y + w.w;",
            per_group(lambda x: (2 * x + np.arange(32, dtype=np.float32))[np.arange(32) ^ 5]),
        ),
        Case(
            "sum_vector",
            "int",
            "int",
            "int2 w = simd_sum(int2(v, 1)); y[i] = w.x * w.y;",
            per_group(lambda x: 32 * x.sum()),
        ),
    ]


def vector_cases() -> list[Case]:
    f32 = np.float32
    special = np.resize(
        np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e5, 65519, 65520, 6e-8, 2e-8, 1e-5, -3.7, 0, 3, 7, -8]), THREADS
    )
    whole = np.resize(np.array([0, 1, 2, 3, 100, 255, -1, -128, 127, 77]), THREADS)
    return [
        Case(
            "construct",
            "float",
            "float",
            "float4 a = float4(float2(v, 1), 2, v); float3 b = float3(5, a.xw); "
            "float4 c = float4(b, v); float4 d = float4(3); y[i] = a.x + a.y * 2; y[64 + i] = c.x + c.w; y[128 + i] = d.z;",
            lambda x: np.concatenate([x + f32(2), f32(5) + x, np.full_like(x, 3)]),
            width=3,
        ),
        Case(
            "swizzle",
            "float",
            "float",
            "float4 a = float4(v, 1, 2, 3); a.zw = a.xy; a.yx += float2(10, 20); "
            "y[i] = a.x; y[64 + i] = a.y; y[128 + i] = a.z; y[192 + i] = a[3];",
            lambda x: np.concatenate([x + f32(20), x * 0 + f32(11), x, x * 0 + f32(1)]),
            width=4,
        ),
        Case(
            "half_from_float",
            "float",
            "half",
            "y[i] = v; half4 a = half4(float4(v)); y[64 + i] = a.w;",
            lambda x: np.tile(x.astype(np.float16), 2),
            width=2,
            values=special,
        ),
        Case(
            "bfloat_from_float",
            "float",
            "ushort",
            "y[i] = as_type<ushort>(bfloat(v)); bfloat4 a = bfloat4(float4(v)); y[64 + i] = as_type<ushort4>(a).z;",
            lambda x: np.tile(encode(x, "bf16"), 2),
            width=2,
            values=special,
        ),
        Case(
            "float_from_bfloat",
            "float",
            "float",
            "y[i] = bfloat(v); y[64 + i] = float4(bfloat4(float4(v))).y;",
            lambda x: np.tile(decode(encode(x, "bf16"), "bf16").astype(f32), 2),
            width=2,
            values=special,
        ),
        Case(
            "bfloat_from_half",
            "half",
            "float",
            "y[i] = float2(bfloat2(half2(v))).x;",
            lambda x: decode(encode(x.astype(f32), "bf16"), "bf16").astype(f32),
        ),
        Case(
            "int_from_float",
            "float",
            "int",
            "y[i] = int(v); y[64 + i] = int4(float4(v)).z;",
            lambda x: np.tile(np.trunc(x).astype(np.int32), 2),
            width=2,
            values=special,
        ),
        Case(
            "float_from_uchar",
            "int",
            "float",
            "y[i] = uchar4(int4(v)).x; y[64 + i] = float4(char4(int4(v))).w;",
            lambda x: np.concatenate([x.astype(np.uint8), x.astype(np.int8)]).astype(f32),
            width=2,
            values=whole,
        ),
        Case(
            "cast_of_vector",
            "int",
            "float",
            "y[i] = ((float4)int4(v)).y; y[64 + i] = static_cast<float4>(int4(v)).z;",
            lambda x: np.tile(x.astype(f32), 2),
            width=2,
        ),
        Case(
            "as_type_words",
            "uint",
            "float",
            "half2 a = as_type<half2>(v); y[i] = a.x; y[64 + i] = a.y; "
            "y[128 + i] = as_type<float>(v); y[192 + i] = as_type<half4>(uint2(0, v)).w;",
            lambda x: np.concatenate(
                [h := x.view(np.float16).reshape(-1, 2).T.astype(f32).reshape(-1), x.view(f32), h[64:]]
            ),
            width=4,
            values=np.arange(64) * 0x01230456 + 0x3C003800,
        ),
        Case(
            "comparison",
            "float",
            "int",
            "bool4 m = float4(v) > float4(0, -1, 1, 9); y[i] = m[0] + 2 * m[1] + 4 * m[2]; "
            "y[64 + i] = any(m) + 2 * all(float2(v) > float2(0)); float2 s = select(float2(1), float2(2), float2(v) > 0); "
            "y[128 + i] = s.y;",
            lambda x: np.concatenate([(x > 0) + 2 * (x > -1) + 4 * (x > 1), (x > -1) + 2 * (x > 0), 1 + (x > 0)]),
            width=3,
        ),
        Case(
            "half_arithmetic",
            "half",
            "half",
            "half4 a = half4(v); y[i] = (a * a + a).x; y[64 + i] = v * v;",
            lambda x: np.concatenate([(x.astype(np.float64) ** 2 + x).astype(np.float16), x * x]),
            1e-3,
            width=2,
        ),
        Case(
            "vector_load",
            "float",
            "float",
            "float4 a = *(device const float4*)(x + i / 4 * 4); y[i] = a[i % 4];",
            lambda x: x,
        ),
    ]


def math_cases() -> list[Case]:
    special = np.resize(np.array([0, -0.0, 1, -1, 0.5, 2, 10, 88, np.inf, -np.inf, np.nan, 1e-20, -0.3, 3.7]), THREADS)
    wide = np.random.default_rng(3).uniform(-8, 8, THREADS)
    positive = np.abs(wide) + 0.1
    unit = wide / 9
    unary = {
        "exp": np.exp,
        "exp2": np.exp2,
        "exp10": lambda x: 10.0**x,
        "sin": np.sin,
        "cos": np.cos,
        "tan": np.tan,
        "tanh": np.tanh,
        "sinh": np.sinh,
        "cosh": np.cosh,
        "atan": np.arctan,
        "asinh": np.arcsinh,
        "floor": np.floor,
        "ceil": np.ceil,
        "trunc": np.trunc,
        "rint": np.rint,
        "fabs": np.abs,
        "abs": np.abs,
        "sign": np.sign,
        "round": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
        "saturate": lambda x: np.clip(x, 0, 1),
        "fract": lambda x: x - np.floor(x),
        "sinpi": lambda x: np.sin(np.pi * x),
        "cospi": lambda x: np.cos(np.pi * x),
    }
    roots = {"sqrt": np.sqrt, "log": np.log, "log2": np.log2, "log10": np.log10, "rsqrt": lambda x: 1 / np.sqrt(x)}
    arcs = {"asin": np.arcsin, "acos": np.arccos, "atanh": np.arctanh}
    cases = []
    for functions, values in ((unary, wide), (roots, positive), (arcs, unit)):
        for name, function in functions.items():
            for type_, tolerance in (("float", 3e-6), ("half", 2e-3)):
                dtype = NUMPY[type_]

                def expected(x: np.ndarray, function: Callable = function, dtype: type = dtype) -> np.ndarray:
                    y = function(x.astype(np.float64)).astype(dtype)
                    return np.tile(y, 3)

                code = f"y[i] = {name}(v); y[64 + i] = fast::{name}({type_}3(v)).y; y[128 + i] = precise::{name}(v);"
                cases.append(Case(f"math_{name}_{type_}", type_, type_, code, expected, tolerance, 3, values))
    two = {
        "pow(abs(v), 1.7f)": lambda x: np.abs(x) ** np.float32(1.7),
        "atan2(v, 2.0f)": lambda x: np.arctan2(x, 2),
        "fmod(v, 3.0f)": lambda x: np.fmod(x, 3),
        "max(v, 1.0f)": lambda x: np.fmax(x, 1),
        "min(v, 1.0f)": lambda x: np.fmin(x, 1),
        "fma(v, v, 1.0f)": lambda x: x * x + 1,
        "clamp(v, -1.0f, 2.0f)": lambda x: np.clip(x, -1, 2),
        "mix(v, 3.0f, 0.25f)": lambda x: x + (3 - x) * 0.25,
        "step(0.5f, v)": lambda x: (x >= 0.5) * 1.0,
        "copysign(2.0f, v)": lambda x: np.copysign(2, x),
        "dot(float3(v, 1, 2), float3(v, 3, 4))": lambda x: x * x + 11,
        "length(float2(v, 3))": lambda x: np.hypot(x, 3),
        "normalize(float2(v, 3)).x": lambda x: x / np.hypot(x, 3),
        "ldexp(v, 3)": lambda x: x * 8,
        "smoothstep(-8.0f, 8.0f, v)": lambda x: (t := (x + 8) / 16) * t * (3 - 2 * t),
        "median3(v, 0.0f, 1.0f)": lambda x: np.clip(x, 0, 1),
        "float(select(1, 2, v > 0))": lambda x: 1.0 + (x > 0),
        "cross(float3(v, 0, 0), float3(0, 1, 0)).z": lambda x: x,
    }
    for number, (code, function) in enumerate(two.items()):
        cases.append(
            Case(
                f"math_two_{number}",
                "float",
                "float",
                f"y[i] = {code};",
                lambda x, function=function: function(x.astype(np.float64)).astype(np.float32),
                3e-6,
                values=wide,
            )
        )
    cases += [
        Case(
            "max_ignores_nan",
            "float",
            "float",
            "y[i] = max(v, -2.0f); y[64 + i] = max(float2(v), float2(-2)).y;",
            lambda x: np.tile(np.fmax(x, -2), 2),
            width=2,
            values=special,
        ),
        Case(
            "predicates",
            "float",
            "int",
            "y[i] = isnan(v) + 2 * isinf(v) + 4 * isfinite(v) + 8 * signbit(v);",
            lambda x: (
                np.isnan(x)
                + 2 * np.isinf(x)
                + 4 * np.isfinite(x)
                + 8 * (np.signbit(x) & ~np.isnan(x))
                + 8 * (np.signbit(x) & np.isnan(x))
            ),
            values=special,
        ),
        Case(
            "limits",
            "float",
            "float",
            "y[i] = numeric_limits<float>::max(); y[64 + i] = numeric_limits<half>::lowest(); "
            "y[128 + i] = -INFINITY; y[192 + i] = numeric_limits<int>::min();",
            lambda x: np.repeat(np.array([3.40282347e38, -65504, -np.inf, -(2.0**31)], np.float32), 64),
            width=4,
        ),
    ]
    return cases


def integer_cases() -> list[Case]:
    values = np.resize(
        np.array([0, 1, 2, 3, 7, 100, 127, 128, 255, 256, 32767, 65535, 123456789, 2**31 - 1, 2**31, 2**32 - 1]),
        THREADS,
    )
    signed = np.resize(np.array([0, 1, -1, 5, -77, 2**31 - 1, -(2**31), 123456]), THREADS)
    bits = [f"{value:032b}" for value in values.tolist()]

    def of(items: list[int]) -> Expected:
        return lambda x: np.array(items, np.int64).astype(x.dtype)

    return [
        Case("popcount_", "uint", "uint", "y[i] = popcount(v);", of([b.count("1") for b in bits]), values=values),
        Case("clz_", "uint", "uint", "y[i] = clz(v);", of([len(b) - len(b.lstrip("0")) for b in bits]), values=values),
        Case("ctz_", "uint", "uint", "y[i] = ctz(v);", of([len(b) - len(b.rstrip("0")) for b in bits]), values=values),
        Case("reverse", "uint", "uint", "y[i] = reverse_bits(v);", of([int(b[::-1], 2) for b in bits]), values=values),
        Case(
            "mulhi_uint",
            "uint",
            "uint",
            "y[i] = mulhi(v, 0x9abcdef0u);",
            of([int(n) * 0x9ABCDEF0 >> 32 for n in values]),
            values=values,
        ),
        Case(
            "mulhi_int",
            "int",
            "int",
            "y[i] = mulhi(v, -77777);",
            of([int(n) * -77777 >> 32 for n in signed]),
            values=signed,
        ),
        Case(
            "rotate_",
            "uint",
            "uint",
            "y[i] = rotate(v, 5u);",
            of([(int(n) << 5 | int(n) >> 27) & 0xFFFFFFFF for n in values]),
            values=values,
        ),
        Case(
            "absdiff_",
            "int",
            "uint",
            "y[i] = absdiff(v, 5);",
            lambda x: np.abs(x.astype(np.int64) - 5).astype(np.uint32),
            values=signed,
        ),
        Case(
            "addsat_",
            "int",
            "int",
            "y[i] = addsat(v, 1000); y[64 + i] = subsat(v, 1000);",
            lambda x: np.clip(
                np.concatenate([x.astype(np.int64) + 1000, x.astype(np.int64) - 1000]), -(2**31), 2**31 - 1
            ).astype(np.int32),
            width=2,
            values=signed,
        ),
        Case(
            "hadd_",
            "int",
            "int",
            "y[i] = hadd(v, 3); y[64 + i] = rhadd(v, 3);",
            lambda x: np.concatenate([(x.astype(np.int64) + 3) >> 1, (x.astype(np.int64) + 4) >> 1]).astype(np.int32),
            width=2,
            values=signed,
        ),
        Case(
            "extract",
            "uint",
            "uint",
            "y[i] = extract_bits(v, 4, 7); y[64 + i] = insert_bits(v, 5u, 3, 4);",
            lambda x: np.concatenate([x >> 4 & 127, (x & ~np.uint32(15 << 3)) | np.uint32(5 << 3)]),
            width=2,
            values=values,
        ),
        Case(
            "min_max",
            "int",
            "int",
            "y[i] = min(v, 3) + max(v, 5); y[64 + i] = clamp(int2(v), -2, 2).x; y[128 + i] = max3(v, 1, 2);",
            lambda x: np.concatenate([np.minimum(x, 3) + np.maximum(x, 5), np.clip(x, -2, 2), np.maximum(x, 2)]),
            width=3,
        ),
    ]
