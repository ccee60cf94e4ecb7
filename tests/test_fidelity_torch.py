"""PyTorch's own prefill kernel, from the header that every torch since 2.13 ships, unmodified on the simulator."""

from __future__ import annotations

import numpy as np
import pytest
from encoding import encode
from fidelity import TYPES, Problem, error, prefill_header, strides
from simulator_engine import BOUNDS, RACES, Library, build_kernels, open_library

pytestmark = pytest.mark.simulator

# c10/metal/common.h, and what kernels since 2.14 use of c10/metal/utils.h, reduced to that; the originals pull in
# headers of no interest here.
COMMON = """
#pragma once
#include <metal_stdlib>
#define IF_CONSTEXPR constexpr
namespace c10 { namespace metal {
template <typename T> using accum_t = float;
template <typename T> inline T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <typename T> inline T max(T a, T b) {
  return ::metal::isnan(a) || ::metal::isnan(b) ? T(NAN) : ::metal::max(a, b);
}
} }
"""
BLOCKS = {64: (32, 32), 128: (32, 16)}
INSTANCES = [("f16", 64, 0), ("f16", 64, 1), ("f16", 128, 1), ("f32", 64, 0), ("f32", 128, 0), ("bf16", 64, 1)]
CASES = [
    Problem("f16", 64, 64, 64),
    Problem("f16", 64, 77, 131, heads=4, group=2),
    Problem("f16", 64, 77, 131, causal="upper"),
    Problem("f16", 128, 77, 131, causal="upper"),
    Problem("f32", 64, 77, 131, heads=2),
    Problem("f32", 128, 33, 48),
    Problem("bf16", 64, 64, 77, causal="upper"),
]


def kernel_name(dtype: str, dim: int, causal: int, block_q: int, block_k: int) -> str:
    shape = f"bq{block_q}_bk{block_k}_bd{dim}_wm4_wn1_hm0_dc{causal}"
    return f"prefill_attention_{dtype}_{shape}_mask{dtype}"


@pytest.fixture(name="header", scope="session")
def read_header() -> str:
    return prefill_header().read_text()


def source(text: str) -> str:
    """The header without its own instantiations, then ours through its macro."""
    end = text.rindex("#define instantiate_attn_shapes_helper")
    ours = [
        f"instantiate_attn({dtype}, {TYPES[dtype][0]}, {BLOCKS[dim][0]}, {BLOCKS[dim][1]}, {dim}, 4, 1, 0, {causal}, "
        f"{dtype}, {TYPES[dtype][0]})"
        for dtype, dim, causal in INSTANCES
    ]
    begin = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
    return begin + text[:end] + "\n".join(ours) + "\n#endif\n"


@pytest.fixture(scope="session", params=["fast", "count"])
def library(header: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    directory = tmp_path_factory.mktemp("torch")
    (directory / "c10/metal").mkdir(parents=True)
    (directory / "c10/metal/common.h").write_text(COMMON)
    (directory / "prefill.metal").write_text(source(header))
    output = directory / f"prefill_{request.param}.so"
    return open_library(
        build_kernels([directory / "prefill.metal"], output, mode=request.param, include_dirs=[directory])
    )


@pytest.mark.parametrize("problem", CASES, ids=lambda problem: problem.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_prefill(library: Library, header: str, problem: Problem, seed: int) -> None:
    q, k, v = problem.tensors(seed)
    out = encode(np.full(q.shape, np.nan), problem.dtype)
    numbers = [problem.batch, problem.heads, problem.dim, problem.length_q, problem.length_k, problem.group]
    scales = np.array([1 / np.sqrt(problem.dim), 1], np.float32)
    stride = np.int64 if "int64_t Q_strides" in header else np.int32  # since 2.14
    params = np.array(numbers, np.int32).tobytes() + scales.tobytes()
    params += np.array([n for x in (q, k, v, out) for n in strides(x)], stride).tobytes()
    block_q, block_k = BLOCKS[problem.dim]
    counters = library.dispatch(
        kernel_name(problem.dtype, problem.dim, int(bool(problem.causal)), block_q, block_k),
        grid=(-(-problem.length_q // block_q), problem.heads, problem.batch),
        group=(128,),
        arguments=[q, k, v, out, params, bytes(16), bytes(64)],
        checks=RACES | BOUNDS if library.instrumented else 0,
        seed=seed,
    )
    expected, _ = problem.reference(q, k, v)
    assert error(out, problem.dtype, expected) < TYPES[problem.dtype][1]
    assert counters["mma"] > 0
