"""MLX's attention kernels, from the headers inside its wheel, unmodified on the simulator.

The wheel is test data: fetched with pip into a cache, never committed. Skipped only if the index can't be reached.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from encoding import encode
from fidelity import TYPES, Problem, error, fetch, strides
from simulator_engine import BOUNDS, RACES, Library, SimulationError, build_kernels, open_library

pytestmark = pytest.mark.simulator

VERSION = "0.32.4"
PREFIX = "mlx/include/"
# Headers of no interest to attention, which lean on Apple's internals.
STUBS = {
    "bf16_math.h": "#pragma once\n",
    "logging.h": "#pragma once\n",
    "complex.h": "#pragma once\ntemplate <typename T>\nstruct complex_t {\n  T real, imag;\n"
    "  constexpr complex_t(T r, T i) : real(r), imag(i) {}\n};\nusing complex64_t = complex_t<float>;\n",
}
BLOCKS = {64: (32, 32), 128: (32, 16)}
STEEL = [("f32", 64, 1), ("f16", 64, 1), ("f16", 128, 1), ("bf16", 64, 1), ("bf16", 128, 1), ("f16", 128, 2)]
VECTOR = [("f32", 64), ("f16", 64), ("bf16", 128)]
CASES = [
    (Problem("f32", 64, 64, 64), 1),
    (Problem("f32", 64, 77, 131, heads=2, causal="lower"), 1),
    (Problem("f16", 64, 77, 131, heads=4, group=2), 1),
    (Problem("f16", 64, 77, 131, causal="lower"), 1),
    (Problem("f16", 128, 77, 131), 1),
    (Problem("f16", 128, 77, 131, causal="lower"), 2),
    (Problem("bf16", 64, 77, 131, heads=2, group=2, causal="lower"), 1),
    (Problem("bf16", 128, 64, 96, batch=2), 1),
]


def unpack(directory: Path) -> list[Path]:
    """Include directories: our stubs before MLX's headers."""
    with zipfile.ZipFile(fetch("mlx-metal", VERSION)) as archive:
        kernels = PREFIX + "mlx/backend/metal/kernels/"
        archive.extractall(directory, [name for name in archive.namelist() if name.startswith(kernels)])
    stubs = directory / "stubs/mlx/backend/metal/kernels"
    stubs.mkdir(parents=True)
    for name, text in STUBS.items():
        (stubs / name).write_text(text)
    return [directory / "stubs", directory / PREFIX]


@pytest.fixture(scope="session")
def headers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return unpack(tmp_path_factory.mktemp("mlx"))


def build(
    headers: list[Path], name: str, mode: str, header: str, instances: list[str], standard: str = "metal3.1"
) -> Library:
    lines = ["#include <metal_stdlib>", '#include "mlx/backend/metal/kernels/utils.h"']
    lines.append(f'#include "mlx/backend/metal/kernels/{header}"')
    source = headers[0].parent / f"{name}.metal"
    source.write_text("\n".join([*lines, *instances, ""]))
    options = {"mode": mode, "include_dirs": headers, "standard": standard}
    return open_library(build_kernels([source], source.with_name(f"{name}_{mode}.so"), **options))


@pytest.fixture(scope="session", params=["fast", "count"])
def steel(request: pytest.FixtureRequest, headers: list[Path]) -> Library:
    instances = []
    for dtype, dim, wn in STEEL:
        scalar, (block_q, block_k) = TYPES[dtype][0], BLOCKS[dim]
        arguments = f"{scalar}, {block_q}, {block_k}, {dim}, {dim}, 4, {wn}, float, float"
        instances.append(f'instantiate_kernel("steel_{dtype}_{dim}_{wn}", attention, {arguments})')
    return build(headers, "steel", request.param, "steel/attn/kernels/steel_attention.h", instances)


@pytest.fixture(scope="session", params=["fast", "count"])
def vector(request: pytest.FixtureRequest, headers: list[Path]) -> Library:
    instances = [f'instantiate_kernel("vector_{t}_{dim}", sdpa_vector, {TYPES[t][0]}, {dim})' for t, dim in VECTOR]
    return build(headers, "vector", request.param, "sdpa_vector.h", instances)


def steel_params(problem: Problem, tensors: list[np.ndarray], blocks: tuple[int, int] | None = None) -> bytes:
    block_q, block_k = blocks or BLOCKS[problem.dim]
    length_q, length_k = problem.length_q, problem.length_k
    head = [problem.batch, problem.heads, problem.dim, length_q, length_k, problem.group]
    counts = [-(-length_q // block_q), -(-length_k // block_k), length_q // block_q, length_k // block_k]
    tail = [*counts, length_q % block_q, length_k % block_k, length_k - length_q]
    scale = np.array([1 / np.sqrt(problem.dim)], np.float32).tobytes()
    numbers = np.array([n for x in tensors for n in strides(x)], np.int64).tobytes()
    return np.array(head, np.int32).tobytes() + scale + np.array(tail, np.int32).tobytes() + numbers


def run_steel(
    library: Library, problem: Problem, wn: int, seed: int, *, has_mask: bool = False, save_lse: bool = True
) -> dict[str, int]:
    """Runs and checks against the reference; the counters."""
    q, k, v = problem.tensors(seed)
    out = encode(np.full(q.shape, np.nan), problem.dtype)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    shape = (problem.batch, problem.heads, problem.length_q, problem.length_k)
    mask = np.random.default_rng(seed + 7).standard_normal(shape).astype(np.float32) if has_mask else None
    block_q, block_k = BLOCKS[problem.dim]
    counters = library.dispatch(
        f"steel_{problem.dtype}_{problem.dim}_{wn}",
        grid=(-(-problem.length_q // block_q), problem.heads, problem.batch),
        group=(32, 4, wn),
        arguments={
            **dict(enumerate([q, k, v, out, steel_params(problem, [q, k, v, out])])),
            **({5: np.array(strides(mask), np.int64), 6: mask} if mask is not None else {}),
            8: lse,
        },
        constants={
            "align_Q": problem.length_q % block_q == 0,
            "align_K": problem.length_k % block_k == 0,
            "has_mask": has_mask,
            "do_causal": bool(problem.causal),
            "has_sinks": False,
            "save_lse": save_lse,
        },
        checks=RACES | BOUNDS if library.instrumented else 0,
        seed=seed,
    )
    expected, expected_lse = problem.reference(q, k, v, mask)
    assert error(out, problem.dtype, expected) < TYPES[problem.dtype][1]
    assert not save_lse or np.abs(lse - expected_lse).max() < 1e-4
    return counters


@pytest.mark.parametrize(("problem", "wn"), CASES, ids=lambda value: getattr(value, "name", f"wn{value}"))
@pytest.mark.parametrize("seed", [0, 1])
def test_steel(steel: Library, problem: Problem, wn: int, seed: int) -> None:
    run_steel(steel, problem, wn, seed, has_mask=problem.dtype == "f16" and problem.dim == 64, save_lse=wn == 1)


def test_steel_reads_device_memory_as_counted_by_hand(steel: Library) -> None:
    problem = Problem("f32", 64, 64, 64)
    counters = run_steel(steel, problem, 1, 0)
    row = problem.dim * 4
    params = counters["device_read_bytes"] - (64 + 2 * 2 * 64) * row  # Q once, K and V once for each of two blocks
    assert not steel.instrumented or 0 <= params < 256 * 200  # what is left are scalars of the parameter block
    assert counters["mma"] == 64 * 64 * 64 // 256


def test_steel_with_two_simdgroups_per_row_races_on_the_lse(steel: Library) -> None:
    """A true finding: both write the same value to the same place (steel_attention.h, `save_lse && sn == 0`)."""
    if steel.instrumented:
        with pytest.raises(SimulationError, match=r"race.*'lse'.*steel_attention\.h:\d+"):
            run_steel(steel, Problem("f16", 128, 77, 131, causal="lower"), 2, 0)
    else:
        run_steel(steel, Problem("f16", 128, 77, 131, causal="lower"), 2, 0)


@pytest.mark.parametrize(("dtype", "dim"), VECTOR)
@pytest.mark.parametrize(("length_k", "causal"), [(64, False), (200, True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_vector(vector: Library, dtype: str, dim: int, length_k: int, causal: bool, seed: int) -> None:
    problem = Problem(dtype, dim, 2, length_k, heads=4, group=2, causal="lower" if causal else "")
    q, k, v = problem.tensors(seed)
    out = encode(np.full(q.shape, np.nan), dtype)
    sizes = [np.array([n], np.uint64) for n in (k.strides[1], k.strides[2], v.strides[1], v.strides[2])]
    arguments: list[np.ndarray] = [q, k, v, out, np.array([2], np.int32), np.array([length_k], np.int32)]
    arguments += [size // np.uint64(k.itemsize) for size in sizes] + [np.array([1 / np.sqrt(dim)], np.float32)]
    vector.dispatch(
        f"vector_{dtype}_{dim}",
        grid=(4, 2),
        group=(1024,),
        arguments=arguments,
        constants={
            **dict.fromkeys(["has_mask", "query_transposed", "bool_mask", "float_mask", "has_sinks"], False),
            "do_causal": causal,
        },
        checks=RACES | BOUNDS if vector.instrumented else 0,
        seed=seed,
    )
    expected, _ = problem.reference(q, k, v)
    assert error(out, dtype, expected) < TYPES[dtype][1]
