"""python -m agx_check build | run: see their --help."""

from __future__ import annotations

import argparse
from pathlib import Path

from .toolchain import Toolchain


def main() -> None:
    parser = argparse.ArgumentParser(prog="agx_check", description="Registers of the Metal kernels on M1, by Mesa.")
    parser.add_argument("--directory", type=Path, default=Path("build/agx"), help="of Mesa and LLVM")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="fetch and compile Mesa's AGX backend with our translator")
    run = commands.add_parser("run", help="measure all kernels, and write src/mfa/bench/registers.json")
    run.add_argument("--only", metavar="REGEX", help="measure the kernels of this name, and write nothing")
    options = parser.parse_args()
    toolchain = Toolchain(options.directory)
    if options.command == "build":
        toolchain.build()
    else:
        from .run import run as run_all

        run_all(toolchain, options.only)


if __name__ == "__main__":
    main()
