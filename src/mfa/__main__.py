"""`python -m mfa info | demo | bench`."""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict


def info() -> None:
    """Prints what there is, and for what there isn't, why."""
    from . import _metal, device_info, simulator, support

    gpu = asdict(device_info())
    why_not, why_not_simulated = gpu.pop("why_not"), simulator.why_not()
    del gpu["uses_matrix_unit"]  # matrix_unit says more
    backend = _metal.info() or {}
    facts = {
        **{name.replace("_", " "): fact for name, fact in gpu.items()},
        "archive": backend.get("archive"),  # of compiled pipelines
        "system": platform.platform(),
        "mps tensors": f"no: {why_not}" if why_not else "yes",
        "simulator": f"no: {why_not_simulated}" if why_not_simulated else "yes",
    }
    for name, fact in facts.items():
        print(f"{name:12} {fact or 'none'}")
    for note in backend.get("notes", []):
        print(f"{'note':12} {note}")
    print()
    print(support.markdown())


def demo() -> None:
    """Prints attention beside float64. Exits with 1 if it is wrong."""
    from .demo import table

    for line in table():
        print(line, flush=True)


def main(command_line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mfa", description="Attention from Metal kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="GPU, kernels, simulator, and what runs where", description="What there is here, and why not."
    )
    commands.add_parser(
        "demo",
        help="attention on the best device, beside float64",
        description="Computes attention on the best device there is, and compares it with float64. The kernels run on "
        "an Apple GPU or in the simulator; where there is neither, it says why and takes the CPU. Exits with 1 if a "
        "result is wrong.",
    )
    commands.add_parser("bench", help="timings, and what a model predicts; see bench --help", add_help=False)
    arguments, rest = parser.parse_known_args(command_line)
    if arguments.command == "bench":
        from .bench.__main__ import main as bench

        bench(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        {"info": info, "demo": demo}[arguments.command]()


if __name__ == "__main__":
    main()
