"""Other people's kernels for the matrix unit of M5, unmodified on the simulator: MLX's, and PyTorch's since 2.14.

Both come from wheels, as in test_fidelity_mlx.py. Such a kernel knows how the unit deals its operands to lanes: it must
be right on the layout that it is made for, and wrong on the other.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import decode, encode
from fidelity import TYPES, Problem, error, fetch, strides
from simulator_engine import BOUNDS, RACES, Library, SimulationError, build_kernels, open_library
from test_fidelity_mlx import steel_params, unpack
from test_fidelity_torch import COMMON

pytestmark = pytest.mark.simulator

TORCH = "2.14.1"
TORCH_KERNELS = "ATen/native/mps/kernels/"
TORCH_TYPES = {"f16": ("float16", "half"), "bf16": ("bfloat16", "bfloat")}
BLOCK_Q, BLOCK_K = 64, 32
M5, OLDER = 10, 9  # Apple GPU families, by their layout

RAGGED = Problem("f16", 64, 77, 131, heads=4, group=2)
CAUSAL = replace(RAGGED, heads=1, group=1, causal="lower")


@dataclass(frozen=True)
class Mutant:
    """MLX's kernel with one rule broken."""

    name: str
    file: str
    old: str
    new: str
    finding: str
    dim: int = 64


Case = tuple[Problem, str]  # and its mask: "", "float" or "bool"
QUICK: tuple[Case, ...] = ((RAGGED, ""), (CAUSAL, "float"), (replace(RAGGED, dtype="bf16", heads=1, group=1), "bool"))
ALL: list[Case] = [
    (RAGGED, ""),
    (RAGGED, "bool"),
    (CAUSAL, ""),
    (CAUSAL, "float"),
    (Problem("f16", 64, 64, 64, batch=2), ""),
    (Problem("f16", 64, 130, 192), "float"),
]


def name(value: Problem | str) -> str:
    return value if isinstance(value, str) else value.name


def mask_of(problem: Problem, kind: str, seed: int) -> np.ndarray | None:
    """In the kernel's format. A bool mask shows the first key to everyone, so that no row is empty."""
    shape = (problem.batch, problem.heads, problem.length_q, problem.length_k)
    noise = np.random.default_rng(seed + 7).standard_normal(shape)
    if kind == "bool":
        noise[..., 0] = 0
        return noise > -0.5
    return encode(noise, problem.dtype) if kind else None


def reference(problem: Problem, tensors: list[np.ndarray], mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if mask is not None:
        mask = np.where(mask, 0, -np.inf) if mask.dtype == bool else decode(mask, problem.dtype)
    return problem.reference(*tensors, mask)


def built(
    directory: Path, begin: str, instances: set[str], end: str, mode: str, layout: int, include_dirs: list[Path]
) -> Library:
    """A library of the instances, half of them in each of two files, for two compilers."""
    sources = [directory / "even.metal", directory / "odd.metal"]
    for i, source in enumerate(sources):
        source.write_text(begin + "".join(sorted(instances)[i::2]) + end)
    options = {"mode": mode, "include_dirs": include_dirs, "standard": "metal4.0", "unit_layout": layout}
    return open_library(build_kernels(sources, directory / f"{mode}_{layout}.so", **options))


# ---- MLX: one SIMD-group owns 16 queries; at D 256 two share them and split D


def mlx_library(
    directory: Path, cases: Sequence[Case], mode: str, layout: int, mutant: Mutant | None = None
) -> Library:
    headers = unpack(directory / "mlx")
    kernels = "mlx/backend/metal/kernels/"
    if mutant:
        file = headers[1] / kernels / "steel/attn" / mutant.file
        assert mutant.old in file.read_text()
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
    begin = f'#include "{kernels}utils.h"\n#include "{kernels}steel/attn/kernels/steel_attention_nax.h"\n'
    instances = {
        f'instantiate_kernel("{mlx_kernel(problem, mask)}", {function}, {scalar}, 64, 32, {tail}, {mask_type}, float)\n'
        for problem, mask in cases
        for scalar, dim in ((TYPES[problem.dtype][0], problem.dim),)
        for mask_type in ("bool" if mask == "bool" else scalar,)
        for function, tail in (
            ("attention_nax", f"{dim}, {dim}, 4, 1") if dim < 256 else ("attention_nax_dsplit", "256, 4, 2"),
        )
    }
    return built(directory, "#include <metal_stdlib>\n" + begin, instances, "", mode, layout, headers)


def mlx_kernel(problem: Problem, mask: str) -> str:
    return f"nax_{problem.dtype}_{problem.dim}_{'bool' if mask == 'bool' else 'own'}"


def run_mlx(library: Library, problem: Problem, mask: str, seed: int) -> tuple[float, dict[str, int]]:
    """The output's largest error, and the counters."""
    tensors = list(problem.tensors(seed))
    out, lse = (
        encode(np.full(tensors[0].shape, np.nan), problem.dtype),
        np.full(tensors[0].shape[:3], np.nan, np.float32),
    )
    values = mask_of(problem, mask, seed)
    arguments: dict[int, np.ndarray | bytes | None] = dict(enumerate([*tensors, out]))
    arguments |= {4: steel_params(problem, [*tensors, out], (BLOCK_Q, BLOCK_K)), 8: lse}
    if values is not None:
        arguments |= {5: np.array(strides(values), np.int64), 6: values}
    counters = library.dispatch(
        mlx_kernel(problem, mask),
        grid=(-(-problem.length_q // BLOCK_Q), problem.heads, problem.batch),
        group=(32, 4, 1 if problem.dim < 256 else 2),
        arguments=arguments,
        constants={
            "align_Q": problem.length_q % BLOCK_Q == 0,
            "align_K": problem.length_k % BLOCK_K == 0,
            "has_mask": values is not None,
            "do_causal": bool(problem.causal),
            "has_sinks": False,
            "save_lse": True,
        },
        checks=RACES | BOUNDS if library.instrumented else 0,
        seed=seed,
    )
    expected, expected_lse = reference(problem, tensors, values)
    largest = error(out, problem.dtype, expected)
    assert largest > TYPES[problem.dtype][1] or np.abs(lse - expected_lse).max() < 1e-4
    return largest, counters


# ---- PyTorch: a10 is made for M5, a9 for what was before


def torch_headers(directory: Path) -> str:
    """Writes what MppAttention.h includes; MppAttention.h, both without their own instantiations."""
    own = Path(torch.__file__).parent / "include" / TORCH_KERNELS
    names = ("PrefillAttention.h", "MppAttention.h")
    if (own / names[1]).exists():
        prefill, mpp = ((own / name).read_text() for name in names)
    else:
        with zipfile.ZipFile(fetch("torch", TORCH, "--python-version=3.12")) as wheel:
            prefill, mpp = (wheel.read(f"torch/include/{TORCH_KERNELS}{name}").decode() for name in names)
    prefill = prefill[: prefill.rindex("#define instantiate_attn_shapes_helper")] + "#endif\n"
    for name, text in (("c10/metal/common.h", COMMON), (TORCH_KERNELS + names[0], prefill)):
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text(text)
    return mpp[: mpp.rindex("#define instantiate_mpp_attn_shapes")]


def torch_library(directory: Path, cases: Sequence[Case], mode: str, layout: int) -> Library:
    begin = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
    begin += torch_headers(directory)
    instances = {
        f'instantiate_mpp_attn_arch("a{family}", {str(family == M5).lower()}, {dtype}, {scalar}, '
        f"64, 32, {problem.dim}, 4, 1, {int(mask != '')}, {int(problem.causal != '')}, "
        f"{'bool_, bool' if mask == 'bool' else f'{dtype}, {scalar}'});\n"
        for problem, mask in cases
        for dtype, scalar in (TORCH_TYPES[problem.dtype],)
        for family in (M5, OLDER)
    }
    return built(directory, begin, instances, "#endif\n#endif\n", mode, layout, [directory])


def run_torch(
    library: Library, problem: Problem, mask: str, seed: int, made_for: int = M5
) -> tuple[float, dict[str, int]]:
    problem = replace(problem, causal="upper" if problem.causal else "")
    tensors = list(problem.tensors(seed))
    out = encode(np.full(tensors[0].shape, np.nan), problem.dtype)
    values = mask_of(problem, mask, seed)
    numbers = [problem.batch, problem.heads, problem.dim, problem.length_q, problem.length_k, problem.group]
    params = np.array(numbers, np.int32).tobytes() + np.array([1 / np.sqrt(problem.dim), 1], np.float32).tobytes()
    params += np.array([n for x in (*tensors, out) for n in strides(x)], np.int64).tobytes()
    dtype = TORCH_TYPES[problem.dtype][0]
    kind = f"hm{int(mask != '')}_dc{int(bool(problem.causal))}_mask{'bool_' if mask == 'bool' else dtype}"
    counters = library.dispatch(
        f"prefill_attention_mpp_a{made_for}_{dtype}_bq64_bk32_bd{problem.dim}_wm4_wn1_{kind}",
        grid=(-(-problem.length_q // BLOCK_Q), problem.heads, problem.batch),
        group=(128,),
        arguments=[
            *(*tensors, out, params),
            np.array([0] * 4 if values is None else [*strides(values), 1], np.int64),
            bytes(64) if values is None else values,
        ],
        checks=RACES | BOUNDS if library.instrumented else 0,
        seed=seed,
    )
    return error(out, problem.dtype, reference(problem, tensors, values)[0]), counters


# ---- one quick library of each; the matrix of all is slow

LIBRARIES = {"mlx": mlx_library, "torch": torch_library}
RUNS = {"mlx": run_mlx, "torch": run_torch}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Library]:
    return functools.cache(lambda who, *key: LIBRARIES[who](tmp_path_factory.mktemp(who), *key))


@pytest.mark.parametrize(("problem", "mask"), QUICK, ids=name)
@pytest.mark.parametrize("who", RUNS)
def test_right_on_m5(library: Callable[..., Library], who: str, problem: Problem, mask: str) -> None:
    error, counters = RUNS[who](library(who, QUICK, "count", M5), problem, mask, 1)
    assert error < TYPES[problem.dtype][1]
    blocks = problem.heads * -(-problem.length_q // BLOCK_Q) * -(-problem.length_k // BLOCK_K)
    hidden = {"mlx": 1, "torch": 4}[who] if problem.causal else 0  # from the lower corner, and from the upper
    assert counters["unit_mma"] == (blocks - hidden) * 2 * BLOCK_Q * BLOCK_K * problem.dim // 4096
    assert counters["mma"] == 0


def test_wrong_on_the_other_layout(library: Callable[..., Library]) -> None:
    problem, mask = QUICK[0]
    older = library("torch", QUICK[:1], "fast", OLDER)
    assert run_torch(older, problem, mask, 1, OLDER)[0] < TYPES[problem.dtype][1]
    assert run_torch(older, problem, mask, 1, M5)[0] > 0.1
    assert run_mlx(library("mlx", QUICK[:1], "fast", OLDER), problem, mask, 1)[0] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("mode", ["fast", "count"])
@pytest.mark.parametrize("layout", [M5, OLDER])
def test_all(library: Callable[..., Library], layout: int, mode: str, dim: int, dtype: str) -> None:
    """In two orders of lanes and groups."""
    # clang 22 optimises a choice by a vector of bool to IR that it then refuses.
    cases = tuple(
        (replace(problem, dtype=dtype, dim=dim), mask) for problem, mask in ALL if mode == "count" or mask != "bool"
    )
    limit = TYPES[dtype][1]
    of_mlx, of_torch = library("mlx", cases, mode, layout), library("torch", cases, mode, layout)
    for problem, mask in cases:
        for seed in (0, 1):
            errors = {family: run_torch(of_torch, problem, mask, seed, family)[0] for family in (M5, OLDER)}
            assert errors[layout] < limit, (problem, mask)
            assert errors[M5 + OLDER - layout] > 0.1, (problem, mask)
            error_of_mlx = run_mlx(of_mlx, problem, mask, seed)[0]
            assert error_of_mlx < limit if layout == M5 else error_of_mlx > 0.1, (problem, mask)


KERNEL = "kernels/steel_attention_nax.h"
K_TAIL = "if (!align_K && is_last_k) {\n            Ktile.load_rows("
V_TAIL = "if (!align_K && is_last_k) {\n            Vtile.load_rows("
Q_TAIL = "if (!align_Q && is_last_q) {\n    if (lim_rows_q <= 0)"
BARRIER = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
RUN = "gemm_op.run(ct_a, ct_b, ct_c);"
SECOND = "ct_b[kElemsPerFrag + i] = Bn1[i];"
LANE = "__metal_get_thread_index_in_simdgroup(ushort())"
MUTANTS = [
    Mutant("keys-unguarded", KERNEL, K_TAIL, K_TAIL.replace("!align_K &&", "false &&"), "out of bounds"),
    Mutant("values-unguarded", KERNEL, V_TAIL, V_TAIL.replace("!align_K &&", "false &&"), "out of bounds"),
    Mutant("output-unguarded", KERNEL, Q_TAIL, Q_TAIL.replace("!align_Q &&", "false &&"), "out of bounds|race"),
    Mutant("lane-misses-product", "nax.h", RUN, f"if ({LANE} != 5) {{ {RUN} }}", "divergent"),
    Mutant("sum-not-loaded", "nax.h", "ct_c[i] = Cn0[i];", "", "uninitialised element of its destination"),
    Mutant("half-a-right-operand", "nax.h", SECOND, "", "uninitialised element of its right operand"),
    Mutant("right-operand-too-long", "nax.h", SECOND, SECOND.replace("[k", "[1 + k"), "element.*out of bounds"),
    Mutant("scores-exchanged-without-barrier", KERNEL, BARRIER, "", "race", 256),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    problem = replace(RAGGED, dim=mutant.dim, heads=1, group=1)
    library = mlx_library(tmp_path, [(problem, "")], "count", M5, mutant)
    with pytest.raises(SimulationError, match=mutant.finding):
        run_mlx(library, problem, "", 1)
