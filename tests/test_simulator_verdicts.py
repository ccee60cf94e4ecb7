"""Small kernels with a fixed verdict: what the simulator stops on, naming the kernel's line, and what it lets pass."""
# ruff: noqa: E501

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from simulator_engine import BOUNDS, RACES, UNINITIALISED, Library, SimulationError, build_kernels, open_library

pytestmark = pytest.mark.simulator


@dataclass(frozen=True)
class Verdict:
    """A kernel over y (1024 floats), x (64 floats) and n; `message` is what the engine says, empty: nothing."""

    name: str
    code: str
    message: str = ""
    grid: int = 1
    group: int = 64


LOAD = "simdgroup_float8x8 m; simdgroup_load(m, t); simdgroup_store(m, y + 64 * simd);"
WRITE = "threadgroup float t[64]; if (simd == 0) { t[lane] = 1; t[lane + 32] = 2; } if (simd == 1) { return; }\n"
SHARED = "threadgroup float t[64]; t[i] = x[i];\n"
VERDICTS = [
    Verdict("matrix_load_without_barrier", WRITE + LOAD, "race.*'t'", 1, 32),
    Verdict("matrix_load_with_mem_none", WRITE + "simdgroup_barrier(mem_flags::mem_none); " + LOAD, "race", 1, 32),
    Verdict("matrix_load_with_barrier", WRITE + "simdgroup_barrier(mem_flags::mem_threadgroup); " + LOAD, "", 1, 32),
    Verdict("lanes_exchange_without_barrier", SHARED + "y[i] = t[i ^ 1];", "race.*'t'"),
    Verdict("groups_exchange_with_simdgroup_barrier", SHARED + "simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[63 - i];",
            "race"),
    Verdict("groups_exchange_with_device_flag", SHARED + "threadgroup_barrier(mem_flags::mem_device); y[i] = t[63 - i];", "race"),
    Verdict("groups_exchange", SHARED + "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[63 - i];"),
    Verdict("load_arguments_differ", "simdgroup_float8x8 m; simdgroup_load(m, x, lane < 16 ? 8 : 4);", "divergent"),
    Verdict("early_return", "if (lane == 3) { return; }\ny[i] = simd_sum(1.0f);", "lanes missing|returned"),
    Verdict("one_simd_skips_barrier", "if (simd == 1) { return; }\nthreadgroup_barrier(mem_flags::mem_none);", "barrier"),
    Verdict("barriers_at_two_sites", "if (simd == 1) { threadgroup_barrier(mem_flags::mem_none); } else {\n"
            "threadgroup_barrier(mem_flags::mem_none); }", "barrier"),
    Verdict("divergent_shuffle", "float v = 1;\nif (lane < 9) {\nv = simd_shuffle_xor(v, 1);\n}\ny[i] = simd_sum(v);", "divergent"),
    Verdict("shuffle_masks_differ", "y[i] = simd_shuffle_xor(1.0f, ushort(lane & 1));", "divergent"),
    Verdict("plain_accumulation", "if (i == 0) { y[0] += 1; }", "race", 4),
    Verdict("atomic_accumulation", "if (i == 0) { atomic_fetch_add_explicit((device atomic_int*)y, 1, memory_order_relaxed); }", "", 4),
    Verdict("too_much_threadgroup_memory", "threadgroup float t[10000]; t[i] = 1; y[i] = t[i];", "40000|32768"),
    Verdict("threadgroup_overrun", "threadgroup float t[60]; t[i] = 1; y[i] = t[i];", "out of bounds.*'t'"),
    Verdict("device_overrun", "y[n + i] = 1;", "out of bounds.*'y'"),
    Verdict("device_overrun_into_the_next_buffer", "y[i] = x[i + 1];", "out of bounds.*'x'"),
    Verdict("read_of_uninitialised_memory", "threadgroup float t[64]; if (i != 5) { t[i] = 1; } y[i] = t[i];", "uninitialised.*'t'"),
]  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    source = tmp_path_factory.mktemp("verdicts") / "verdicts.metal"
    parameters = (
        "device float* y [[buffer(0)]], const device float* x [[buffer(1)]], constant int& n [[buffer(2)]], "
        "ushort i [[thread_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]], "
        "ushort simd [[simdgroup_index_in_threadgroup]]"
    )
    kernels = [f"kernel void {v.name}({parameters}) {{\n{v.code}\n}}\n" for v in VERDICTS]
    source.write_text("#include <metal_stdlib>\nusing namespace metal;\n" + "".join(kernels))
    return open_library(build_kernels([source], source.with_suffix(".so")))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("verdict", VERDICTS, ids=lambda verdict: verdict.name)
def test_verdict(library: Library, verdict: Verdict, seed: int) -> None:
    memory, n = np.zeros(64 + 1024, np.float32), np.array([1024], np.int32)
    x, y = memory[:64], memory[64:]  # side by side: what overruns x is in y
    x[:] = np.arange(64)
    checks = RACES | BOUNDS | (UNINITIALISED if "uninitialised" in verdict.name else 0)  # it would see some races first
    options = {"grid": (verdict.grid,), "group": (verdict.group,), "seed": seed, "checks": checks}
    if not verdict.message:
        library.dispatch(verdict.name, arguments=[y, x, n], **options)  # type: ignore[arg-type]
        return
    with pytest.raises(SimulationError, match=rf"(?s)kernel '{verdict.name}'.*({verdict.message})") as caught:
        library.dispatch(verdict.name, arguments=[y, x, n], **options)  # type: ignore[arg-type]
    assert "verdicts.metal:" in str(caught.value)


ASAN_RUN = """
import sys
import numpy as np
from simulator_engine import open_library
open_library(sys.argv[1]).dispatch("f", grid=(1,), group=(64,), arguments=[np.zeros(60, np.float32)], checks=0)
"""


def test_asan_names_the_kernels_line(tmp_path: Path) -> None:
    """gcc's runtime serves clang's instrumentation, so that no clang runtime is needed."""
    command = [shutil.which("gcc") or "false", "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("gcc with libasan is not installed")
    source = tmp_path / "overrun.metal"
    source.write_text("kernel void f(device float* y,\n  ushort i [[thread_index_in_threadgroup]]) {\n  y[i] = 1;\n}\n")
    output = build_kernels([source], tmp_path / "overrun.so", mode="asan")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", ASAN_RUN, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr
    assert "overrun.metal:3" in done.stderr, done.stderr
