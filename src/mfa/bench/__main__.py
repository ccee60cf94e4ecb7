"""`python -m mfa.bench`, the same as `python -m mfa bench`."""

import argparse
import sys
from collections.abc import Sequence

from .chips import CHIPS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mfa bench",
        description="Times attention on the best device there is, beside every other backend that is installed.",
        epilog="Further options belong to the mode: add --help to it.",
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="this, and the options of the mode")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cpu", action="store_true", help="CPU tensors against torch: ratios of medians, and goals")
    modes.add_argument(
        "--autotune", action="store_true", help="measure all tiles on this Mac, and ATen; print the best as a patch"
    )
    modes.add_argument("--figures", action="store_true", help="write the README's figures: predictions, counted memory")
    modes.add_argument("--model", choices=CHIPS, metavar="CHIP", help=f"what a model predicts for {', '.join(CHIPS)}")
    options, rest = parser.parse_known_args(arguments)
    if options.help:
        parser.print_help()
        rest = ["--help"]
    if options.model:
        _model(options.model, rest)
    elif options.cpu:
        from . import cpu

        cpu.main(rest)
    elif options.figures:
        from . import figures

        figures.main(rest)
    elif options.autotune:
        from . import autotune

        autotune.main(rest)
    elif _suite(rest) == "generate":
        from . import generate

        generate.main([word for word in rest if word not in ("--suite", "generate", "--suite=generate")])
    else:
        from . import sweep

        sweep.main(rest)


def _suite(arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--suite")
    suite: str | None = parser.parse_known_args(arguments)[0].suite
    return suite


def _model(chip: str, arguments: Sequence[str]) -> None:
    from . import report

    parser = argparse.ArgumentParser(prog=f"python -m mfa bench --model {chip}", description=report.__doc__)
    parser.add_argument("--tiles", action="store_true", help="also all tiles, chosen by tuning.def or not")
    for line in report.lines(CHIPS[chip], parser.parse_args(arguments).tiles):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
