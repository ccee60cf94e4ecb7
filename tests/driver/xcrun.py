"""Stands in for `xcrun -sdk macosx metal SOURCE -o METALLIB`: compiles a Metal 4 source for the simulator."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def install(folder: Path) -> str:
    """As `xcrun`; the PATH that finds it."""
    script = folder / "xcrun"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{TESTS}" exec "{sys.executable}" -m driver.xcrun "$@"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def main(arguments: list[str]) -> None:
    assert arguments[:3] == ["-sdk", "macosx", "metal"], arguments
    if arguments[3:] == ["--version"]:
        sys.stdout.write("Apple metal version 32023 (a stand-in)\n")
        return
    from simulator_engine import build_kernels, translate

    *flags, source, option, output = arguments[3:]
    assert option == "-o"
    assert "-std=metal4.0" in flags
    assert "-mmacosx-version-min=26.2" in flags  # older ones lay cooperative tensors out in another way
    includes = [flag.removeprefix("-I") for flag in flags if flag.startswith("-I")]
    library = Path(output).with_suffix(".so")
    try:
        build_kernels([source], library, standard="metal4.0", include_dirs=includes)
    except translate.CompileError as error:
        sys.exit(str(error))
    Path(output).write_text(f"mfa-simulator-metallib\n{library}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
