"""Kernels -> LLVM IR: the translation that the simulator makes for NVIDIA GPUs, with the shims of `shim/`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc/simulator/cuda"))
import translate_cuda  # noqa: E402

OPTIONS = [  # everything inline; loops of known length unrolled, as far as Apple's compiler is known to
    *("-inline-threshold=1000000", "-inlinehint-threshold=1000000"),
    *("-unroll-threshold=3000", "-unroll-max-count=64", "-unroll-allow-peeling=false"),
]


@dataclass(frozen=True)
class Pipeline:
    """A kernel with the function constants of a plain, aligned problem."""

    name: str  # of the kernel, and a variant's behind a slash
    threads: int
    constants: tuple[int, ...]  # indices of those that are true

    @property
    def kernel(self) -> str:
        return self.name.split("/")[0]


def ir(
    source: translate_cuda.Source, pipeline: Pipeline, clang: Path, environment: Mapping[str, str] | None = None
) -> str:
    """Raises subprocess.CalledProcessError."""
    constants = "".join(f",{index}" for index in pipeline.constants)
    with tempfile.TemporaryDirectory() as directory:
        file, output = Path(directory) / "translated.cc", Path(directory) / "kernel.ll"
        file.write_text(translate_cuda.with_entry(source, pipeline.kernel))
        flags = [*translate_cuda.LANGUAGE, "-march=sm_80", "-fno-vectorize", "-fno-slp-vectorize"]
        flags += [word for option in OPTIONS for word in ("-mllvm", option)]
        flags += [f"-DMFA_SIM_TRUE_CONSTANTS={constants}", f"-DAGX_THREADS={pipeline.threads}"]
        flags += ["-I", str(ROOT / "csrc/simulator"), "-include", str(HERE / "shim" / "shim.h")]
        command = [str(clang), *flags, "-S", "-emit-llvm", str(file), "-o", str(output)]
        subprocess.run(command, check=True, env=environment)
        return output.read_text()
