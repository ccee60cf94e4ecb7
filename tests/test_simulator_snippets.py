"""What the simulator's compiler and lint reject, and what they accept.

MSL's verdict is from the language specification, not from Apple's compiler. All snippets are compiled at once, in
parallel processes.
"""
# ruff: noqa: E501

from __future__ import annotations

import concurrent.futures
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulator_engine  # noqa: F401  (finds csrc/simulator)
import translate
from fidelity import prefill_header
from lint import lint
from translate import CompileError, compile_file

ROOT = Path(__file__).parent.parent
BEGIN = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"


@dataclass(frozen=True)
class Snippet:
    name: str
    code: str
    message: str = ""  # a regular expression for the error; empty: accepted
    links: bool = False  # the verdict needs an object, not only the syntax
    standard: str = "metal3.1"


def body(name: str, statements: str, message: str = "", links: bool = False) -> Snippet:
    """Statements in a kernel with one pointer per address space."""
    parameters = (
        "device float* d [[buffer(0)]], const device float* cd [[buffer(1)]], constant float* c [[buffer(2)]], "
        "device half* h [[buffer(3)]], device bfloat* b [[buffer(4)]], uint lane [[thread_index_in_simdgroup]]"
    )
    memory = "threadgroup float t[64]; thread float p[4] = {0, 0, 0, 0}; "
    return Snippet(
        name, f"kernel void f({parameters}) {{\n{memory}\n{statements}\n(void)t; (void)p; }}", message, links
    )


UNIT = "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"
LEGAL = "16, 32, 16, false, false, true"


def unit(name: str, statements: str, message: str = "", descriptor: str = LEGAL, scope: str = "simdgroup") -> Snippet:
    """Statements about `op`, a matmul2d. In them LEFT, RIGHT and SUM(..) get operands of the element types given."""
    code = re.sub(
        r"\b(LEFT|RIGHT|SUM)\((.*?)\)",
        lambda found: (
            {
                "LEFT": f"op.get_left_input_cooperative_tensor<{found[2]}>",
                "RIGHT": f"op.get_right_input_cooperative_tensor<{found[2]}>",
                "SUM": f"op.get_destination_cooperative_tensor<decltype(left), decltype(right), {found[2]}>",
            }[found[1]]
            + "()"
        ),
        statements,
    )
    return Snippet(
        name,
        f"{UNIT}using namespace mpp::tensor_ops;\nkernel void f(device float* d) {{\n"
        f"constexpr auto descriptor = matmul2d_descriptor({descriptor});\n"
        f"matmul2d<descriptor, execution_{scope}> op;\n{code}\n}}",
        message,
        standard="metal4.0",
    )


def product(types: str) -> str:
    """One product of these element types: left, right, destination."""
    operands = f"auto left = LEFT({types}); auto right = RIGHT({types}); auto sum = SUM({types.split(', ')[2]});"
    return operands + " op.run(left, right, sum);"


HALVES = product("half, half, float")
NO_PRODUCT = "no product of these element types"
LENGTHS = "each of m, n and k is the constant 16 or 32"
SPACE = r"address space|cannot initialize|no matching|changes address|not allowed|casts away|cannot bind"
REJECTED = [
    # address spaces
    body("device-to-threadgroup", "threadgroup float* x = d; *x = 0;", SPACE),
    body("threadgroup-to-device", "device float* x = t; *x = 0;", SPACE),
    body("device-to-thread", "thread float* x = d; *x = 0;", SPACE),
    body("thread-to-device", "device float* x = p; *x = 0;", SPACE),
    body("constant-to-device", "const device float* x = c; d[0] = *x;", SPACE),
    body("device-to-constant", "constant float* x = cd; d[0] = *x;", SPACE),
    body("threadgroup-to-thread", "thread float* x = t; *x = 0;", SPACE),
    body("thread-to-threadgroup", "threadgroup float* x = p; *x = 0;", SPACE),
    body("reinterpret-cast-across", "auto x = reinterpret_cast<threadgroup uint*>(d); *x = 0;", "reinterpret_cast"),
    body(
        "c-cast-across", "threadgroup float* x = (threadgroup float*)d; *x = 0;", "C-style cast between address spaces"
    ),
    body("c-cast-across-read", "d[0] = *(constant float*)(d + 1);", "C-style cast between address spaces"),
    body("thread-reference-to-device", "thread float& x = d[0]; x = 0;", "bind|address space"),
    body("write-through-const-device", "*(cd + 1) = 0;", "read-only|const"),
    body("write-through-constant", "c[0] = 0;", "read-only|const"),
    Snippet(
        "device-pointer-to-threadgroup-parameter",
        "void g(threadgroup float* x) { *x = 0; }\nkernel void f(device float* d [[buffer(0)]]) { g(d); }",
        "no matching function",
    ),
    Snippet(
        "threadgroup-variable-in-function",
        "void g() { threadgroup float x[4]; x[0] = 0; }\nkernel void f(device float* d [[buffer(0)]]) { g(); }",
        "address space",
    ),
    body("threadgroup-initialiser", "threadgroup float x = 0;", "no initialiser"),
    body("threadgroup-array-initialiser", "threadgroup float x[2] = {0, 0};", "no initialiser"),
    # types
    body("double", "double x = 1; d[0] = x;", "msl_has_no_double"),
    body("float-to-bfloat", "b[0] = d[0];", "bfloat|__bf16"),
    body("float-to-bfloat-initialiser", "bfloat x = d[0]; b[0] = x;", "bfloat|__bf16"),
    body("bfloat-plus-float-to-bfloat", "b[0] = b[1] + d[0];", "bfloat|__bf16"),
    body("half-plus-bfloat", "d[0] = h[0] + b[0];", "__bf16"),
    body("bfloat-to-half", "h[0] = b[0];", "incompatible"),
    body("half-to-bfloat", "bfloat x = h[0]; b[0] = x;", "cannot initialize|incompatible"),
    body("vector-of-three-from-two", "float3 x = float3(1, 2); d[0] = x.x;", "as many elements"),
    body("vector-of-two-from-three", "vec<float, 2> x = vec<float, 2>(d[0], 2, 3); d[0] = x.x;", "as many elements"),
    body("vector-from-longer-vector", "float2 x = float2(float4(0)); d[0] = x.x;", "as many elements"),
    body("swizzle-beyond-the-end", "float2 x = float2(0); d[0] = x.z;", "out of bounds|exceeds"),
    body("float4-to-half4", "float4 x = float4(d[0]); half4 y = x; h[0] = y.x;", "cannot initialize"),
    body("int4-to-float4", "int4 x = int4(1); float4 y = x; d[0] = y.x;", "cannot initialize"),
    body("float4-plus-half4", "d[0] = (float4(1) + half4(1)).x;", "convert between|cannot convert"),
    body(
        "int-vector-to-bfloat",
        "char4 x = char4(1); vec<bfloat, 4> y = vec<bfloat, 4>(x); b[0] = y.x;",
        "built from floats",
    ),
    body("narrowing-in-braces", "struct Pair { int x, y; }; Pair pair = {lane, 0}; d[0] = pair.x;", "narrow"),
    body("narrowing-to-a-constructor", "struct S { int x; S(int y) : x(y) {} }; S s = {lane}; d[0] = s.x;", "narrow"),
    body("as-type-of-another-size", "d[0] = as_type<float>(h[0]);", "different sizes"),
    # overloads
    body("max-of-float-and-half", "d[0] = max(d[0], h[0]);", "ambiguous"),
    body("max-of-int-and-uint", "int i = 1; d[0] = max(i, lane);", "ambiguous"),
    body("max-of-float-and-int", "d[0] = max(d[0], 1);", "ambiguous"),
    body("min-of-short-and-int", "short i = 1; d[0] = min(i, 2);", "ambiguous"),
    body("exp2-of-int", "d[0] = exp2(3);", "ambiguous"),
    body("max-of-bfloat", "b[0] = max(b[0], b[1]);", "ambiguous"),
    body("shuffle-of-bool", "d[0] = simd_shuffle_xor(lane > 1, 1);", "no matching"),
    body("and-of-floats", "d[0] = simd_and(d[0]);", "no matching"),
    body("barrier-without-flags", "threadgroup_barrier();", "no matching|too few"),
    body("barrier-of-a-number", "threadgroup_barrier(2);", "no matching|no known conversion|cannot initialize"),
    body("atomic-of-a-plain-pointer", "atomic_fetch_add_explicit(d, 1.0f, memory_order_relaxed);", "no matching"),
    body("stronger-memory-order", "atomic_load_explicit((device atomic_int*)d, memory_order_seq_cst);", "undeclared"),
    # matrices
    body("matrix-of-int", "simdgroup_matrix<int, 8, 8> m; (void)m;", "holds half, bfloat or float"),
    body("matrix-of-16", "simdgroup_matrix<half, 16, 16> m; (void)m;", "is 8x8"),
    body("load-of-another-type", "simdgroup_float8x8 m; simdgroup_load(m, h, 8);", "no matching"),
    body("load-from-thread", "simdgroup_float8x8 m; simdgroup_load(m, p, 8);", "no matching"),
    body("store-to-constant", "simdgroup_float8x8 m(1.0f); simdgroup_store(m, c, 8);", "no matching"),
    body(
        "store-to-const-device", "simdgroup_float8x8 m(1.0f); simdgroup_store(m, cd, 8);", "no matching|read-only|const"
    ),
    body("elements-without-cast", "simdgroup_half8x8 m; m.thread_elements() = half2(1);", "no viable|no match"),
    body(
        "elements-to-vector", "simdgroup_half8x8 m; half2 x = m.thread_elements(); h[0] = x.x;", "no viable|initialize"
    ),
    # the matrix unit
    Snippet("unit-before-metal-4", UNIT, "file not found"),
    unit("unit-16x16x16", HALVES, "one of m, n and k is 32", "16, 16, 16, false, false, true"),
    unit("unit-64-rows", HALVES, LENGTHS, "64, 32, 16, false, false, true"),
    unit("unit-8-columns", HALVES, LENGTHS, "32, 8, 16, false, false, true"),
    unit("unit-any-k", HALVES, LENGTHS, "16, 32"),
    unit("unit-of-four-simdgroups", HALVES, "belong to one SIMD-group", scope="simdgroups<4>"),
    unit("unit-of-a-thread", HALVES, "belong to one SIMD-group", scope="thread"),
    unit("unit-half-to-bfloat", product("half, half, bfloat"), NO_PRODUCT),
    unit("unit-float-to-half", product("float, half, half"), NO_PRODUCT),
    unit("unit-mixed-to-half", product("half, bfloat, half"), NO_PRODUCT),
    unit("unit-of-int", product("int, int, int"), NO_PRODUCT),
    unit("unit-of-mixed-signs", product("int8_t, uchar, int"), NO_PRODUCT),
    unit("unit-of-int8-to-float", product("int8_t, int8_t, float"), NO_PRODUCT),
    unit("unit-of-half-and-int8", product("half, int8_t, float"), NO_PRODUCT),
    unit("unit-exact-float", product("float, half, float"), "without relaxed_precision", "16, 32, 16"),
    unit("unit-const-operand", HALVES.replace("auto left", "const auto left"), "no matching member function"),
    unit(
        "unit-operands-exchanged", HALVES.replace("run(left, right", "run(right, left"), "no matching member function"
    ),
    unit(
        "unit-operand-of-another-product",
        "constexpr auto wide = matmul2d_descriptor(16, 16, 32, false, false, true); "
        "matmul2d<wide, execution_simdgroup> other; "
        + HALVES.replace("LEFT(half, half, float)", "other.get_left_input_cooperative_tensor<half, half, float>()"),
        "no matching member function",
    ),
    unit(
        "unit-destination-by-element-types",
        "auto sum = op.get_destination_cooperative_tensor<half, half, float>(); (void)sum;",
        "element_type|cannot be used prior to '::'",
    ),
    unit(
        "unit-destination-as-input-of-half",
        HALVES + " auto next = op.get_left_input_cooperative_tensor<half, half, float>(sum); (void)next;",
        "of its own element type",
    ),
    unit(
        "unit-destination-as-input-of-another-shape",
        HALVES + " auto next = op.get_left_input_cooperative_tensor<float, half, float>(sum); (void)next;",
        "of its own shape",
    ),
    unit(
        "unit-input-as-input",
        HALVES + " auto next = op.get_left_input_cooperative_tensor<half, half, float>(left); (void)next;",
        "only a destination",
    ),
    # kernels
    Snippet("unknown-built-in", "kernel void f(uint x [[thread_position_in_gird]]) {}", "thread_position_in_gird"),
    Snippet(
        "duplicate-buffer",
        "kernel void f(device float* x [[buffer(1)]], device float* y [[buffer(1)]]) { *x = *y; }",
        "share a buffer",
    ),
    Snippet("buffer-31", "kernel void f(device float* x [[buffer(31)]]) { *x = 0; }", "out of range"),
    Snippet("buffer-by-value", "kernel void f(float x [[buffer(0)]]) {}", "a pointer or a reference"),
    Snippet("kernel-with-a-result", "kernel int f(device float* x [[buffer(0)]]) { return 1; }", "returns void"),
    Snippet("parameter-without-attribute", "kernel void f(uint x) {}", "needs one known attribute"),
    Snippet("built-in-as-float", "kernel void f(float x [[thread_index_in_simdgroup]]) {}", "is declared as"),
    Snippet("scalar-built-in-as-vector", "kernel void f(uint2 x [[thread_index_in_simdgroup]]) {}", "is a scalar"),
    Snippet(
        "instantiation-without-host-name",
        "template <typename T> kernel void f(device T* x [[buffer(0)]]) { *x = 0; }\n"
        "template [[kernel]] decltype(f<float>) f<float>;",
        "needs a host_name",
    ),
    Snippet("negative-constant-index", "constant bool x [[function_constant(-1)]];", "out of range"),
    # the language
    Snippet(
        "writable-global",
        "int counter;\nkernel void f(device int* x [[buffer(0)]]) { *x = ++counter; }",
        "counter",
        True,
    ),
    body("static-local", "static int n = 0; d[0] = ++n;", "static locals", True),
    body("goto", "goto end; end: d[0] = 0;", "msl_has_no_goto"),
    body("throw", "throw 1;", "msl_has_no_throw"),
    body("try", "try { d[0] = 0; } catch (...) {}", "msl_has_no_try"),
    body("new", "thread int* x = new int; d[0] = *x;", "msl_has_no_new"),
    Snippet("virtual", "struct S { virtual int g() { return 1; } };", "msl_has_no_virtual"),
    body("typeid", "typeid(int);", "typeid"),
    body("std", "d[0] = std::max(d[0], d[1]);", "std"),
    body("undeclared", "d[0] = undeclared_function(1);", "undeclared"),
]

ACCEPTED = [
    body("unsuffixed-literal-is-float", 'auto x = 1.5 * 2.0; static_assert(sizeof(x) == 4, ""); d[0] = x;'),
    body("implicit-float-to-half", "h[0] = d[0]; half x = 0.5; h[1] = x;"),
    body("explicit-bfloat", "b[0] = bfloat(d[0]); b[1] = static_cast<bfloat>(float(h[0]));"),
    body("comparison-to-bool4", "bool4 m = float4(d[0]) < float4(1); d[0] = any(m) && all(m) ? m[0] : m[1];"),
    body("swizzles", "float4 x = float4(1, 2, 3, 4); x.xy = x.wz; x.w += 1; d[0] = x.zyx.y;"),
    body("vec-constructor", "vec<half, 4> x = vec<half, 4>(h[0], half2(1), h[1]); h[0] = x.w;"),
    body("mixed-constructor", "float4 x = float4(float2(1), d[0], 2); int4 y = int4(x); d[0] = y.x;"),
    body("as-type", "half2 x = as_type<half2>(1u); uint4 y = as_type<uint4>(float4(1)); d[0] = x.x + y.y;"),
    body("vector-load", "float4 x = *(const device float4*)(cd + 4); *(device float4*)d = x;"),
    body("threadgroup-vectors", "threadgroup float4 x[8], y; x[lane] = float4(0); y = x[0]; d[0] = y.x;"),
    body("threadgroup-cast", "threadgroup uint4* x = (threadgroup uint4*)t; x[0] = uint4(0); d[0] = t[0];"),
    body(
        "elements-by-reinterpret-cast",
        "simdgroup_half8x8 m; reinterpret_cast<thread half2&>(m.thread_elements()) = half2(1);",
    ),
    body(
        "mixed-multiply",
        "simdgroup_half8x8 a(1.0h); simdgroup_float8x8 e(1.0f), r; simdgroup_multiply_accumulate(r, e, a, e);",
    ),
    body("half-literal", "h[0] = 1.5h;"),
    body("braced-vector", "ulong3 x{1, 2, 3}; d[0] = x.z;"),
    Snippet(
        "overloads-by-address-space",
        "int g(device float* x) { return 1; }\nint g(threadgroup float* x) { return 2; }\nint g(thread float* x) { return 3; }\n"
        "kernel void f(device int* d [[buffer(0)]]) { threadgroup float t[2]; float p[2]; *d = g(t) + g(p); }",
    ),
    Snippet(
        "specialisation-by-address-space",
        "template <typename T> struct S {};\ntemplate <typename T> struct S<device T*> { static constexpr constant int v = 1; };\n"
        "template <typename T> struct S<threadgroup T*> { static constexpr constant int v = 2; };\n"
        'static_assert(S<threadgroup float*>::v == 2, "");',
    ),
    Snippet(
        "constant-table", "constant float table[3] = {1, 2, 3};\nkernel void f(device float* d) { *d = table[1]; }"
    ),
    Snippet("constant-array-parameter", "float g(constant float x[3]) { return x[1]; }"),
    Snippet(
        "derived-function-constants",
        "constant bool a [[function_constant(0)]];\nconstant int n [[function_constant(1)]];\n"
        "constant int m = is_function_constant_defined(n) ? n : 3;\nconstant bool c = a && m > 2;\n"
        "kernel void f(device int* d, const device int* e [[buffer(1), function_constant(a)]]) { if (c) { *d = a ? *e : m; } }",
    ),
    Snippet(
        "instantiation-forms",
        "template <typename T, int N = 2> [[kernel, max_total_threads_per_threadgroup(N * 32)]] void f(device T* x) { *x = N; }\n"
        'template [[host_name("a" "b")]] [[kernel]] decltype(f<vec<half, 4>, 3>) f<vec<half, 4>, 3>;\n'
        'template [[host_name("c")]] [[kernel]] void f<float>(device float* x);\n'
        "typedef decltype(f<int>) form;\n"
        'template [[host_name("d")]] kernel form f<int>;\n'
        '[[host_name("e")]] [[max_total_threads_per_threadgroup(64)]] kernel void g(device int* x) { *x = 0; }',
    ),
    Snippet(
        "loop-pragmas",
        "#define COUNT 4\nvoid g(thread int* x) {\n#pragma unroll(COUNT)\nfor (int i = 0; i < 4; ++i) x[i] = 0; }",
    ),
    *(
        unit(
            f"unit-{m}x{n}x{k}", HALVES, descriptor=f"{m}, {n}, {k}, {flags}, true, matmul2d_descriptor::mode::multiply"
        )
        for (m, n, k), flags in {
            (16, 32, 16): "false, true",
            (32, 16, 16): "true, false",
            (16, 16, 32): "true, true",
            (16, 32, 32): "false, false",
            (32, 32, 32): "false, true",
        }.items()
    ),
    *(
        unit(f"unit-{types.replace(', ', '-')}", product(types))
        for types in (
            "float, float, float",
            "float, half, float",
            "bfloat, half, float",
            "half, half, half",
            "bfloat, bfloat, bfloat",
            "int8_t, int8_t, int",
            "uchar, uchar, int",
        )
    ),
    unit("unit-16-bits-exactly", HALVES, descriptor="16, 32, 16"),
    unit(
        "unit-destination-as-input",
        f"{HALVES} constexpr auto second = matmul2d_descriptor(16, 32, 32, false, false, true); "
        "matmul2d<second, execution_simdgroup> next; "
        "if (next.is_compatible_as_left_input<float, half, float>(sum)) { "
        "auto p = next.get_left_input_cooperative_tensor<float, half, float>(sum); d[0] = p[15]; }",
    ),
    Snippet("lambda", "int g(int x) { auto twice = [](int y) { return 2 * y; }; return twice(x); }"),
]

# Wrong verdicts that we know of, asserted so that a change is noticed.
# Accepted here though MSL rejects them. The lint finds those marked so.
KNOWN_GAPS_ACCEPTED = [
    Snippet("unqualified-pointer (lint)", "float g(float* x) { return *x; }"),
    Snippet("unqualified-reference (lint)", "float g(const float& x) { return x; }"),
    Snippet("recursion (lint)", "int g(int n) { return n < 1 ? 0 : g(n - 1); }"),
    Snippet("typedef-vector-bit-cast", "typedef float4 T4;\nfloat g(int4 x) { return T4(x).x; }"),
    Snippet("exact-literal-to-bfloat", "bfloat g() { return 1.0; }"),
    Snippet("int-to-bfloat", "bfloat g(int x) { bfloat y = x; return y; }"),
    Snippet("long-long", "long long g() { return 1; }"),
    Snippet("const-global-outside-constant", "const int n = 3;\nint g() { return n; }"),
    body("any-mix-of-matrix-types", "simdgroup_bfloat8x8 a; simdgroup_half8x8 e, r; simdgroup_multiply(r, a, e);"),
]
# Rejected here though MSL accepts them.
KNOWN_GAPS_REJECTED = [
    Snippet(
        "struct-copy-from-constant",
        "struct S { int x; };\nint g(constant S& s) { S t = s; return t.x; }",
        "no matching|address",
    ),
    Snippet("member-function-on-device", "struct S { int x; int g() const device { return x; } };", "error"),
    Snippet("typedef-vector-constructor", "typedef float4 T4;\nfloat4 g() { return T4(1, 2, 3, 4); }", "error"),
    Snippet("packed-float3", "float g(device packed_float3* x) { return x->x; }", "packed_float3"),
    Snippet("swizzle-of-bool4", "bool g(bool4 x) { return x.y; }", "illegal vector component"),
    Snippet("half-to-bfloat-by-static-cast", "bfloat g(half x) { return static_cast<bfloat>(x); }", "static_cast"),
    Snippet("vector-direct-initialisation", "float g() { float4 x(1, 2, 3, 4); return x.x; }", "error"),
]


def verdict(directory: Path, snippet: Snippet) -> str:
    """The compiler's error, or nothing."""
    source = directory / f"{snippet.name}.metal"
    source.write_text(BEGIN + snippet.code + "\n")
    try:
        output = source.with_suffix(".o") if snippet.links else None
        compile_file(source, output, mode="fast", standard=snippet.standard)
    except CompileError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("snippets")
    snippets = REJECTED + ACCEPTED + KNOWN_GAPS_ACCEPTED + KNOWN_GAPS_REJECTED
    assert len({snippet.name for snippet in snippets}) == len(snippets)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each waits for a compiler
        texts = pool.map(lambda snippet: verdict(directory, snippet), snippets)
        return {snippet.name: text for snippet, text in zip(snippets, texts, strict=True)}


def name(snippet: Snippet) -> str:
    return snippet.name


@pytest.mark.simulator
@pytest.mark.parametrize("snippet", REJECTED + KNOWN_GAPS_REJECTED, ids=name)
def test_rejected(verdicts: dict[str, str], snippet: Snippet) -> None:

    text = verdicts[snippet.name]
    assert text, "accepted"
    assert re.search(snippet.message, text), text
    assert snippet.links or f"{snippet.name}.metal:" in text, text


@pytest.mark.simulator
@pytest.mark.parametrize("snippet", ACCEPTED + KNOWN_GAPS_ACCEPTED, ids=name)
def test_accepted(verdicts: dict[str, str], snippet: Snippet) -> None:
    assert verdicts[snippet.name] == ""


@pytest.mark.simulator
def test_strict_refuses_a_warning(tmp_path: Path) -> None:
    source = tmp_path / "unused.metal"
    source.write_text("void g(int x) { int y; }\n")
    compile_file(source, None, mode="fast")
    with pytest.raises(CompileError, match=r"unused\.metal:1:.*unused (variable|parameter)"):
        compile_file(source, None, mode="fast", strict=True)


ABSENT = "kernel void f(device float* d, const device float* x [[buffer(1), function_constant(has_x)]])"
LINTED = [
    ("float g(float* x) { return *x; }", "parameter 'float[*] x'"),
    ("float g(const float& x) { return x; }", "parameter 'const float& x'"),
    ("template <typename T>\nvoid g(device T* y, vec<T, 2>& x) { x = *y; }", r"parameter 'vec<T, 2>& x'"),
    ("float* g(device int* x);\nfloat* h(int x) { return 0; }", "what h returns"),
    ("void g(device float* x) { float* y = 0; }", "on 'y'"),
    ("void g(device float* x) { auto& y = x[0]; y = 1; }", "on 'y'"),
    ("struct S { const float* x; };", "on 'x'"),
    ("void g(device float* x) { for (float* y = 0; ; ) {} }", "on 'y'"),
    ("uint g(thread float& x) { return reinterpret_cast<uint&>(x); }", "cast to 'uint&'"),
    ("void g(thread float* x) { auto y = (uint*)x; }", r"cast to 'uint\*'"),
    ("void g() { threadgroup float x[4]; }", "which is no kernel"),
    ("kernel void g(device float* d) { threadgroup float x = 0; }", "no initialiser"),
    ("int g(int n) { return n ? g(n - 1) : 0; }", "g is recursive"),
    ("int h(int n);\nint g(int n) { return h(n); }\nint h(int n) { return g(n); }", "is recursive"),
    ("float4 g(int4 x) { return (float4)x; }", "C-style cast to float4"),
    ("half4 g(float4 x) { return (vec<half, 4>)(x); }", "C-style cast to vec<half, 4>"),
    ("void g(device float* x) { auto y = (threadgroup float*)x; }", "from device to threadgroup"),
    ("void g(device float* x) { auto y = reinterpret_cast<constant uint*>(x); }", "from device to constant"),
    ("void g() { goto end; end:; }", "goto"),
    ("void g() { half8 x; }", "half8"),
    ("void g() { vec<half, 8> x; }", "vec<half, 8>"),
    (f"{ABSENT} {{ auto y = x + 1; }}", "arithmetic on 'x', which exists only where has_x is on"),
    (f"{ABSENT} {{ if (is_other) {{ *d = x[0]; }} }}", "arithmetic on 'x', which exists only where has_x is on"),
    (f"{ABSENT} {{ if (has_x) {{ *d = 0; }} *d = x[0]; }}", "arithmetic on 'x', which exists only where has_x is on"),
]


@pytest.mark.parametrize(("code", "message"), LINTED)
def test_lint_finds(tmp_path: Path, code: str, message: str) -> None:

    source = tmp_path / "snippet.metal"
    source.write_text(code + "\n")
    findings = [str(finding) for finding in lint([source])]
    assert any(re.search(rf"snippet\.metal:\d+: .*{message}", finding) for finding in findings), findings


@pytest.mark.parametrize("snippet", [s for s in ACCEPTED if s.name != "derived-function-constants"], ids=name)
def test_lint_is_quiet_on_good_snippets(tmp_path: Path, snippet: Snippet) -> None:
    source = tmp_path / "snippet.metal"
    source.write_text(BEGIN + snippet.code + "\n")
    assert lint([source]) == []


def test_lint_is_quiet_on_our_kernels() -> None:
    assert lint(sorted((ROOT / "metal").glob("*.h")) + sorted((ROOT / "metal").glob("*.metal"))) == []


def test_lint_is_quiet_on_torch() -> None:
    assert lint([prefill_header()]) == []


@pytest.mark.simulator
def test_only_a_compiler_that_was_tried_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one on PATH is never looked for; one that MFA_CLANG names must be of a version that our tests have run with."""
    other = tmp_path / "clang"
    other.write_text("#!/bin/sh\necho clang version 19.1.7\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find = translate.compiler.__wrapped__  # not cached
    assert str(other) not in find()
    monkeypatch.setenv("MFA_CLANG", str(other))
    with pytest.raises(CompileError, match=r"MFA_CLANG: .* is version 19; .* tried with 22 only"):
        find()
    other.write_text("#!/bin/sh\necho clang version 22.0.1\n")
    assert find() == (str(other),)
    monkeypatch.setenv("MFA_CLANG", str(tmp_path / "missing"))
    with pytest.raises(CompileError, match=r"MFA_CLANG: .*missing"):
        find()
