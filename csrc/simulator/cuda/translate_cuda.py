"""Compiles Metal kernels to PTX for an NVIDIA GPU: the simulator's translation, with another set of shim headers.

Needs clang, as the simulator does, and neither a GPU nor the CUDA toolkit. A pipeline is one kernel with its function
constants compiled in, as Metal's are; its entry point has the kernel's host name, and one parameter: 31 addresses by
buffer index, by value.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import translate
from rewrite import rewrite

SHIM = Path(__file__).parent / "shim.h"
LANGUAGE = [  # also of tests/agx_check
    "--target=nvptx64-nvidia-cuda",
    "-x",
    "c++",
    "-std=c++20",
    "-nostdinc",
    "-nostdinc++",
    "-O3",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",
    "-fsigned-char",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=on",
    "-fconvergent-functions",
    "-Xclang",
    "-cl-single-precision-constant",
    "-Wno-everything",
    "-DMFA_SIM_UNIT_LAYOUT=10",
]
FLAGS = [
    *LANGUAGE,
    "-mllvm",
    "-inline-all-viable-calls",  # as Apple's compiler does
]
REGISTRATION = re.compile(
    r"static const ::mfa_sim::Registration<&(?P<entry>.*)> mfa_sim_kernel_\d+\((?P<name>(?:\s*\"[^\"]*\")+), \{.*\}, "
    r"(?P<threads>[^{}]*), __FILE__, __LINE__\);"
)
THREADGROUP_VARIABLE = re.compile(
    r"auto& (\w+) = ::mfa_sim::threadgroup_variable<threadgroup ([^\[]*?)\s*((?:\[.*?\])*)>\(\"[^;]*;"
)


@dataclass(frozen=True)
class Pipeline:
    kernel: str
    constants: tuple[int, ...]  # indices of the function constants that are true
    threads: int  # per threadgroup

    @property
    def name(self) -> str:
        return "-".join([self.kernel, *map(str, self.constants)])


@dataclass(frozen=True)
class Source:
    """A translated .metal, from which pipelines are compiled."""

    text: str
    kernels: frozenset[str]


def translate_source(source: Path, *, include_dirs: Sequence[Path] = (), standard: str = "metal3.1") -> Source:
    """Raises translate.CompileError, source_text.TranslationError."""
    flags = [f"-D{name}" for name in translate.PREDEFINED] + [f"-I{path}" for path in include_dirs]
    with tempfile.TemporaryDirectory() as directory:
        text = rewrite(translate.preprocess(source, directory, flags, None, source, standard))
    text = re.sub(r"static const ::mfa_sim::ConstantRegistration<.*?;", "", text)
    text = THREADGROUP_VARIABLE.sub(
        r"static __attribute__((address_space(3), loader_uninitialized)) \2 mfa_sim_\1\3; "
        r"auto& \1 = ::mfa_sim::threadgroup_variable<threadgroup \2 \3>(mfa_sim_\1);",
        text,
    )
    return Source(text, frozenset(_name(found) for found in REGISTRATION.finditer(text)))


def translate_kernels(metal: Path) -> Iterator[Source]:
    """Every .metal of a folder and of its unit/, which is Metal 4. Raises what translate_source raises."""
    for folder, standard in ((metal, "metal3.1"), (metal / "unit", "metal4.0")):
        for path in sorted(folder.glob("*.metal")):
            yield translate_source(path, include_dirs=[metal], standard=standard)


def _name(registration: re.Match[str]) -> str:
    return "".join(re.findall(r"\"([^\"]*)\"", registration["name"]))


def with_entry(source: Source, kernel: str) -> str:
    """C++ in which the kernel, and no other, has an entry point."""

    def entry(found: re.Match[str]) -> str:
        if _name(found) != kernel:
            return ""
        return (
            f'extern "C" __attribute__((nvptx_kernel)) void {kernel}(mfa_sim_arguments arguments) '
            f"{{ ::mfa_sim::Entry<&{found['entry']}>::run(arguments); }}"
        )

    return REGISTRATION.sub(entry, source.text)


def compile_ptx(source: Source, pipeline: Pipeline, *, tensor_core: bool = True) -> str:
    """The PTX of one pipeline, for any GPU from sm_80 on. Raises translate.CompileError.

    `tensor_core`: whether matrices of half or bfloat are multiplied there (cuda/matrix.h).
    """
    constants = "".join(f",{index}" for index in pipeline.constants)
    with tempfile.TemporaryDirectory() as directory:
        file, output = Path(directory) / "translated.cc", Path(directory) / "kernel.ptx"
        file.write_text(with_entry(source, pipeline.kernel))
        compiler = [part for part in translate.compiler() if not part.startswith("--target")]
        # Within 2 ulp, since the exact division is a call, around which registers spill; but append promises bits.
        division = 2 if pipeline.kernel.startswith("append_") else 1
        flags = ["-march=sm_80", "-mllvm", f"-nvptx-prec-divf32={division}"]
        flags += [f"-DMFA_SIM_TRUE_CONSTANTS={constants}", f"-DMFA_SIM_TENSOR_CORE={tensor_core:d}"]
        translate.run([*compiler, *FLAGS, *flags, "-include", str(SHIM), "-S", str(file), "-o", str(output)])
        ptx = output.read_text()
    # The one thing that plain C++ can't say: how many threads there are, and so how many registers each may have.
    return re.sub(r"(\.entry [^)]*\))", rf"\1\n.maxntid {pipeline.threads}, 1, 1", ptx, count=1)
