"""Compiles C++ that uses metal-cpp, on Linux: clang for its blocks, the system's C++ library, headers/include for Apple's.

The object links with what g++ compiles. metal-cpp comes from MFA_METAL_CPP_DIR, or is fetched into .cache/ once.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(REPOSITORY / "cmake")]

import translate  # noqa: E402
from mac_check import inputs  # noqa: E402


def metal_cpp() -> Path:
    """The folder that contains Metal/Metal.hpp."""
    if chosen := os.environ.get("MFA_METAL_CPP_DIR"):
        return Path(chosen)
    cache = REPOSITORY / ".cache" / "mac-check"
    cache.mkdir(parents=True, exist_ok=True)
    return inputs.metal_cpp(cache)


def command(metal_cpp_directory: Path) -> list[str]:
    compiler = translate.compiler()
    resources = ()
    if Path(compiler[0]).name == "zig":  # its own headers lie where only zig looks for them
        resources = ("-resource-dir", str(Path(compiler[0]).parent / "lib"))
    includes = ["-isystem", str(HERE / "include"), "-isystem", str(metal_cpp_directory)]
    return [*compiler, *resources, "-x", "c++", "-std=c++20", "-fblocks", "-fPIC", "-Wall", "-Wextra", *includes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--depfile", type=Path)
    parser.add_argument("--metal-cpp", type=Path)
    arguments, flags = parser.parse_known_args()
    depfile = ["-MMD", "-MF", str(arguments.depfile)] if arguments.depfile else []
    compile_command = [*command(arguments.metal_cpp or metal_cpp()), *depfile, *flags]
    return subprocess.run(
        [*compile_command, "-c", str(arguments.source), "-o", str(arguments.output)], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
