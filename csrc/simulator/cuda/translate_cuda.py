"""Compiles Metal kernels to PTX: the simulator's translation, with entry points, constants and shared memory of CUDA.

    python csrc/simulator/cuda/translate_cuda.py -I metal -o kernels.ptx metal/forward_f16.metal

Needs neither a GPU nor the CUDA toolkit. Every kernel is an `extern "C"` function of its host name, whose one parameter is
31 addresses by buffer index; function constants are the bytes of `mfa_function_constants`, by index.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import translate
from rewrite import rewrite

SHIM = Path(__file__).parent / "shim.h"
FLAGS = (
    "-x cuda --cuda-device-only -nocudainc -nocudalib -nostdinc -nostdinc++ -std=c++17 -O3 -fno-exceptions -fno-rtti "
    "-fno-math-errno -fno-trapping-math -ffp-contract=on -fsigned-char -fno-strict-aliasing -Wno-everything "
    "-mllvm -inline-threshold=1000000 "  # as Apple's compiler, which inlines everything
    "-Xclang -cl-single-precision-constant"
).split()


def to_cuda(text: str) -> str:
    """On what rewrite() makes."""
    text = re.sub(
        r"static const ::mfa_sim::Registration<&(.*)> mfa_sim_kernel_\d+\(((?:\s*\"[^\"]*\")+), \{.*\}, ([^{}]*), "
        r"__FILE__, __LINE__\);",
        _entry,
        text,
    )
    text = re.sub(r"static const ::mfa_sim::ConstantRegistration<.*?;", "", text)
    text = re.sub(
        r"auto& (\w+) = ::mfa_sim::threadgroup_variable<threadgroup ([^\[]*?)\s*((?:\[.*?\])*)>\(\"[^;]*;",
        r"__attribute__((__shared__)) \2 \1\3;",
        text,
    )
    return f"#pragma clang force_cuda_host_device begin\n{text}\n#pragma clang force_cuda_host_device end\n"


def _entry(found: re.Match[str]) -> str:
    function, literals, threads = found.groups()
    name = "".join(re.findall(r"\"([^\"]*)\"", literals))
    bounds = f"__attribute__((launch_bounds({threads}))) " if threads != "0" else ""
    return (
        f'extern "C" __attribute__((__global__)) {bounds}void {name}(mfa_sim_arguments arguments) '
        f"{{ ::mfa_sim::Entry<&{function}>::run(arguments); }}"
    )


def compile_ptx(
    source: Path,
    output: Path,
    *,
    include_dirs: Sequence[Path] = (),
    architecture: str = "sm_90",
    defines: Sequence[str] = (),
) -> None:
    """One .metal -> one .ptx. Raises translate.CompileError."""
    flags = [f"-D{name}" for name in [*translate.PREDEFINED, "__MFA_CUDA__=1", *defines]] + [
        f"-I{path}" for path in include_dirs
    ]
    with tempfile.TemporaryDirectory() as directory:
        text = translate.preprocess(source, directory, flags, None, output)
        file = Path(directory) / "translated.cu"
        file.write_text(to_cuda(rewrite(text)))
        compiler = [part for part in translate.compiler() if not part.startswith("--target")]
        command = [*compiler, *FLAGS, f"--cuda-gpu-arch={architecture}", "-include", str(SHIM), "-S"]
        translate.run([*command, str(file), "-o", str(output)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile one .metal file to PTX.")
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", dest="output", type=Path, required=True)
    parser.add_argument("-I", dest="include_dirs", action="append", type=Path, default=[])
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    try:
        compile_ptx(**vars(options))
    except translate.CompileError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
