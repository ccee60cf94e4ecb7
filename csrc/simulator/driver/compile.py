"""Compiles C++ that uses metal-cpp, on Linux: clang for its blocks, the system's C++ library, include/ for Apple's.

The object links with what g++ compiles. metal-cpp comes from cmake/find_metal_cpp.py.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(REPOSITORY / "cmake")]

import find_metal_cpp  # noqa: E402
import translate  # noqa: E402


def command(metal_cpp_directory: Path) -> list[str]:
    compiler = translate.compiler()
    resources = ()
    if Path(compiler[0]).name == "zig":  # its own headers lie where only zig looks for them
        resources = ("-resource-dir", str(Path(compiler[0]).parent / "lib"))
    includes = ["-I", str(HERE / "include"), "-isystem", str(metal_cpp_directory)]
    # NS::SharedPtr sends release to null, from which clang would conclude that it never is null, and drop later checks.
    language = ["-x", "c++", "-std=c++20", "-fblocks", "-fPIC", "-fno-delete-null-pointer-checks", "-Wall", "-Wextra"]
    return [*compiler, *resources, *language, *includes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--depfile", type=Path)
    parser.add_argument("--metal-cpp", type=Path)
    arguments, flags = parser.parse_known_args()
    directory = arguments.metal_cpp or find_metal_cpp.find()
    depfile = ["-MMD", "-MF", str(arguments.depfile)] if arguments.depfile else []
    words = [*command(directory), *depfile, *flags, "-c", str(arguments.source), "-o", str(arguments.output)]
    return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
