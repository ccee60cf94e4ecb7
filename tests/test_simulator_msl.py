"""The simulator's metal_stdlib against numpy: every SIMD operation, matrices, atomics, vectors, conversions, math.

Each case is one kernel over 64 threads, two SIMD-groups; all of them are compiled once per mode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from encoding import decode, encode
from simulator_cases import LANES, NUMPY, THREADS, Case, integer_cases, math_cases, simd_cases, vector_cases, vote_cases
from simulator_engine import BOUNDS, RACES, Library, SimulationError, build_kernels, open_library

pytestmark = pytest.mark.simulator

CASES = simd_cases() + vote_cases() + vector_cases() + math_cases() + integer_cases()


@dataclass
class Suite:
    library: Library
    mode: str
    checks: int = field(init=False)

    def __post_init__(self) -> None:
        self.checks = RACES | BOUNDS if self.library.instrumented else 0

    def run(self, kernel: str, arguments: list[np.ndarray | bytes], seed: int, **options: object) -> dict[str, int]:
        sizes = {"grid": (1,), "group": (LANES,), **options}
        return self.library.dispatch(kernel, arguments=arguments, seed=seed, checks=self.checks, **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="session", params=["fast", "count"])
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    directory = tmp_path_factory.mktemp("msl")
    begin = "#include <metal_stdlib>\nusing namespace metal;\n"
    groups = [simd_cases(), vote_cases() + vector_cases() + integer_cases(), math_cases()]
    texts = ["".join(case.source() for case in cases) for cases in groups]
    sources = [Path(__file__).with_name("simulator_operations.metal")]
    for number, text in enumerate(texts):
        sources.append(directory / f"cases{number}.metal")
        sources[-1].write_text(begin + text)
    return Suite(
        open_library(build_kernels(sources, directory / f"msl_{request.param}.so", mode=request.param)), request.param
    )


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_numpy(suite: Suite, case: Case, seed: int) -> None:
    x = case.x()
    y = np.zeros(THREADS * case.width, NUMPY[case.output])
    suite.run("k_" + case.name, [x, y], seed, group=(THREADS,))
    with np.errstate(all="ignore"):
        expected = case.expected(x).astype(y.dtype)
    if case.tolerance:
        np.testing.assert_allclose(y, expected, rtol=case.tolerance, atol=case.tolerance)
    else:
        np.testing.assert_array_equal(y, expected)


def parameters(stride: int = 8, x: int = 0, y: int = 0, transpose: bool = False, value: float = 0) -> bytes:
    return np.array([stride, x, y, transpose], np.int32).tobytes() + np.array([value], np.float32).tobytes()


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("stride", "x", "y", "transpose"), [(8, 0, 0, False), (13, 3, 2, False), (13, 3, 2, True), (24, 8, 8, True)]
)
def test_matrix_copies(suite: Suite, dtype: str, stride: int, x: int, y: int, transpose: bool, seed: int) -> None:
    source = encode(np.random.default_rng(1).standard_normal((16, stride)), dtype)
    target = np.zeros((8, 8), source.dtype)
    suite.run(f"copy_{dtype}", [source, target, parameters(stride, x, y, transpose)], seed)
    block = source[y : y + 8, x : x + 8]
    np.testing.assert_array_equal(target, block.T if transpose else block)
    small = np.ascontiguousarray(source.reshape(-1)[:64].reshape(8, 8))
    suite.run(f"scatter_{dtype}", [small, target, parameters(stride, x, y, transpose)], seed)
    np.testing.assert_array_equal(target, small.T if transpose else small)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_filled_and_diagonal_matrices(suite: Suite, dtype: str) -> None:
    target = encode(np.zeros((2, 8, 8)), dtype)
    suite.run(f"fill_{dtype}", [target, parameters(value=1.25)], 0)
    np.testing.assert_array_equal(decode(target, dtype), [np.full((8, 8), 1.25), 1.25 * np.eye(8)])


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    "types",
    [
        "f16_f16_f32_f32",
        "f32_f16_f32_f32",
        "bf16_bf16_f32_f32",
        "f32_f32_f32_f32",
        "f16_f16_f16_f16",
        "bf16_f16_f32_bf16",
    ],
)
def test_multiply_is_fp32_in_order_rounded_once(suite: Suite, types: str, seed: int) -> None:
    formats = types.split("_")
    generator = np.random.default_rng(seed)
    # Few bits, so that float64 holds each step exactly and the only roundings are the ones under test.
    a, b, c = (
        encode(
            encode(generator.standard_normal((8, 8)), "bf16").view(np.uint16) * 0
            + np.round(generator.standard_normal((8, 8)) * 64) / 64,
            dtype,
        )
        for dtype in formats[:3]
    )
    d = encode(np.zeros((2, 8, 8)), formats[3])
    counters = suite.run(f"multiply_{types}", [a, b, c, d], seed)
    left, right = decode(a, formats[0]), decode(b, formats[1])
    for got, start in ((d[0], decode(c, formats[2])), (d[1], np.zeros((8, 8)))):
        total = start
        for k in range(8):
            total = (left[:, k : k + 1] * right[k] + total).astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal(got, encode(total, formats[3]))
    assert counters["mma"] == 2


def test_lane_layout(suite: Suite) -> None:
    y = np.zeros((LANES, 2), np.int32)
    suite.run("layout", [y, np.arange(64, dtype=np.float32)], 0)
    lane = np.arange(LANES)
    row, column = ((lane // 4) & 4) + (lane // 2) % 4, ((lane // 4) & 2) * 2 + (lane % 2) * 2
    np.testing.assert_array_equal(y, np.stack([8 * row + column, 8 * row + column + 1], axis=1))


def test_uninitialised_matrix_is_nan(suite: Suite) -> None:
    if suite.mode == "count":
        y = np.zeros(64, np.float32)
        suite.run("uninitialised", [y], 0)
        assert np.isnan(y).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_atomics(suite: Suite, seed: int) -> None:
    y = np.array([0, 0, 100, -1, 0, -1, 0, 0, 0, 0], np.int32)
    f, w = np.zeros(1, np.float32), np.zeros(65, np.uint32)
    suite.run("atomics", [y, f, w], seed, group=(64,))
    some = (1 << 30) - 1
    assert y.tolist() == [2016, -2016, -5, 63, some, ~some, 0, 1, 1, 77]
    assert f[0] == 32
    assert w.tolist() == [1] * 64 + [64]


@pytest.mark.parametrize("seed", [0, 5])
def test_positions(suite: Suite, seed: int) -> None:
    y = np.zeros((2, 6, 96), np.uint32)
    suite.run("positions", [y], seed, grid=(3, 2, 1), group=(32, 3, 2))
    z, row, x = np.indices(y.shape)
    np.testing.assert_array_equal(y, 6000 + ((z % 2) * 3 + row % 3) * 32 + x % 32)


@pytest.mark.parametrize(("has_extra", "scale"), [(True, 3), (False, 3), (False, None)])
def test_function_constants(suite: Suite, has_extra: bool, scale: int | None) -> None:
    y, extra = np.zeros(32, np.float32), np.arange(32, dtype=np.float32)
    values: dict[str, bool | int | float] = {
        "has_extra": has_extra,
        "offset": 0.5,
        **({"scale": scale} if scale else {}),
    }
    suite.run("constants", [y, extra] if has_extra else [y], 0, constants=values)
    expected = 1.5 + 6 if scale else -1
    np.testing.assert_array_equal(y, expected + extra * has_extra)


def test_dynamic_threadgroup_memory(suite: Suite) -> None:
    y = np.zeros(64, np.float32)
    suite.run("dynamic", [y], 3, group=(64,), threadgroup_memory={0: 256, 1: 1024})
    np.testing.assert_array_equal(y, 63 - np.arange(64) + (np.arange(64) ^ 1))


def test_exponentials_are_counted(suite: Suite) -> None:
    x, y = np.ones(64, np.float32), np.zeros(192, np.float32)
    counters = suite.run("k_math_exp2_float", [x, y], 0, group=(THREADS,))
    assert counters["exp"] == (64 * 5 if suite.mode == "count" else 0)  # two scalars and a float3 per thread


def test_reflection(suite: Suite) -> None:
    kernel = suite.library.kernels["constants"]
    found = [
        (p.name, p.index, p.kind, p.writable, p.function_constant) for p in kernel.parameters[: kernel.parameter_count]
    ]
    assert found == [(b"y", 0, 0, 1, None), (b"extra", 1, 0, 0, b"has_extra"), (b"i", -1, 2, 0, None)]
    assert suite.library.instrumented == (suite.mode == "count")


def test_errors_name_the_kernels_line(suite: Suite, tmp_path: Path) -> None:
    source = tmp_path / "divergent.metal"
    source.write_text(
        "#include <metal_stdlib>\nusing namespace metal;\n"
        "kernel void f(device float* y, uint lane [[thread_index_in_simdgroup]]) {\n"
        "  if (lane < 7) {\n"
        "    y[lane] = simd_sum(1.0f);\n"
        "  }\n"
        "}\n"
    )
    library = open_library(build_kernels([source], tmp_path / f"divergent_{suite.mode}.so", mode=suite.mode))
    with pytest.raises(SimulationError, match=r"divergent\.metal:5"):
        library.dispatch("f", grid=(1,), group=(32,), arguments=[np.zeros(32, np.float32)], checks=0)
