"""python -m gpu_check build | run | count | table: see their --help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="The Metal kernels on an NVIDIA GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="plan and compile; needs the package and clang, but no GPU")
    build.add_argument("--architecture", default="sm_90", help="of the cubins, if there is ptxas")
    build.add_argument("--counters", action="store_true", help="also what `count` runs; fetches the mlx-metal wheel")
    build.add_argument(
        "--mma",
        choices=["sync", "shuffles"],
        help="how half-precision matrices are multiplied: mma.sync, for accuracy as of a matrix unit (the default), "
        "or shuffles and FMAs at the same cost for every type, for times and counters (the default with --counters)",
    )
    run = commands.add_parser("run", help="run and compare; needs a GPU and a torch with CUDA, but not the package")
    run.add_argument("--report", type=Path, help="a JSON file for the results")
    count = commands.add_parser("count", help="launches to be counted by a profiler; needs what `run` needs")
    count.add_argument(
        "--metrics", type=Path, help="print ncu's --metrics, of what ncu --query-metrics wrote, and stop"
    )
    table = commands.add_parser("table", help="Markdown of what ncu --csv --page raw wrote")
    table.add_argument("profile", type=Path)
    for command in (build, run):
        command.add_argument("--groups", nargs="+", help="of cases.py; all by default")
    for command in (build, run, count, table):
        command.add_argument("--directory", type=Path, default=Path("build/gpu"), help="of what is compiled")
    options = parser.parse_args()
    if options.command == "build":
        from .build import build as build_all
        from .cases import GROUPS

        groups = options.groups or list(GROUPS)
        mma = options.mma or ("shuffles" if options.counters else "sync")
        build_all(options.directory, groups, options.architecture, counters=options.counters, tensor_core=mma == "sync")
        return 0
    if options.command == "run":
        from .check import run as run_all

        return run_all(options.directory, options.groups, options.report)
    from . import counters

    if options.command == "count":
        if options.metrics is None:
            return counters.count(options.directory)
        sys.stdout.write(counters.metrics_that_exist(options.metrics.read_text()))
        return 0
    sys.stdout.write(counters.table(options.directory, options.profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
