"""Attention over a suite of problems: timed beside every backend that is installed, or counted in the simulator."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..simulator import FAMILIES
from . import counted, machine, output, plots, timed
from .cases import SUITES, cases


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa bench", description=__doc__)
    parser.add_argument(
        "--suite", choices=SUITES, default="quick", help="or generate, a language model: add --help to that"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[], metavar="L", help="instead of the suite's")
    parser.add_argument("--dims", nargs="+", type=int, default=[], metavar="D", help="instead of the suite's")
    parser.add_argument(
        "--device",
        choices=["mps", "cpu", "simulator"],
        default=None,
        help="default: mps if our kernels run on it, or else cpu. simulator: counts of what our kernels do, no times",
    )
    parser.add_argument("--family", choices=FAMILIES, default="apple7", help="that is simulated (default %(default)s)")
    parser.add_argument("--backward", action="store_true", help="forward with backward too")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement (default %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with the environment")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="roofline, speed-up, memory; needs matplotlib")
    options = parser.parse_args(command_line)
    device = options.device or machine.best_device()
    if options.plots and device == "simulator":
        parser.error("--plots: counts are no times")
    environment = machine.environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    problems = cases(options.suite, options.dtypes, options.lengths, options.dims)
    trains = (False, True) if options.backward else (False,)
    if device == "simulator":
        coming: Iterator[output.Row] = counted.rows(problems, options.family, trains)
    else:
        coming = timed.rows(problems, device, trains, options.seconds)
    rows: list[output.Row] = []
    try:
        for row in output.shown(coming, len(problems) * len(trains)):
            rows.append(row)
    except KeyboardInterrupt:  # what was measured is kept
        print("interrupted", file=sys.stderr)
    times = [row for row in rows if isinstance(row, timed.Row)]
    if times:
        output.print_summary(times)
    if options.csv and rows:
        output.write_csv(options.csv, rows)
    if options.json:
        output.write_json(options.json, rows, environment)
    if options.plots:
        try:
            plots.plot(times, environment, options.plots)
        except ImportError as error:
            sys.exit(f"no plots: {error}; install the dependency group bench")
