"""Line coverage of csrc/metal by the tests on the stand-in device: PYTHONPATH=tests python -m driver.coverage

clang marks the basic blocks that run (-fsanitize-coverage: its coverage mapping needs a runtime that ziglang lacks),
and objdump says which lines they are.
"""

import bisect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import build

TESTS = build.HERE.parent
METAL = build.REPOSITORY / "csrc" / "metal"
FLAGS = ("-O0", "-gdwarf-4", "-fsanitize-coverage=inline-bool-flag,pc-table,no-prune")
ROW = re.compile(r"^(\S+)\s+(\d+)\s+0x([0-9a-f]+)", re.MULTILINE)


class Lines(NamedTuple):
    """Lines with code, as "file:number"."""

    covered: list[str]
    missed: list[str]

    @property
    def share(self) -> float:
        return len(self.covered) / (len(self.covered) + len(self.missed))


def library() -> Path:
    source = build.HERE / "coverage.cpp"
    with build.locked():
        runtime = build.compile_all("coverage", [source], [])
    made = build.ops("coverage", {}, metal_flags=FLAGS, extra=runtime)
    made.with_name("mfa.metallib").write_text("mfa-simulator-metallib\n")  # see csrc/simulator/driver/library.cpp
    return made


def run(library: Path) -> dict[int, bool]:
    """Address of a basic block -> whether a process of the tests has run it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "MFA_COVERAGE": folder,
            "MFA_LIBRARY_UNDER_TEST": str(library),
            "MFA_CACHE_DIR": str(Path(folder) / "cache"),
        }
        options = ["-q", "-p", "driver.stand_in", "-p", "no:xdist", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, str(TESTS / "mps")]
        done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        blocks: dict[int, bool] = {}
        for file in Path(folder).iterdir():
            if file.is_file():
                for line in file.read_text().splitlines():
                    address, has_run = line.split()
                    blocks[int(address, 16)] = blocks.get(int(address, 16), False) or has_run == "1"
    return blocks


def lines(library: Path, blocks: dict[int, bool]) -> Lines:
    """A line is covered if a block with code of it has run."""
    table = subprocess.run(
        ["objdump", "-W", "--dwarf=decodedline", library], capture_output=True, text=True, check=True
    )
    names = {path.name for path in METAL.iterdir()}
    starts = sorted(blocks)
    found: dict[tuple[str, int], bool] = {}
    for name, number, address in ROW.findall(table.stdout):
        before = bisect.bisect_right(starts, int(address, 16)) - 1
        if name in names and int(number) > 0 and before >= 0:
            key = (name, int(number))
            found[key] = found.get(key, False) or blocks[starts[before]]
    texts = {key: f"{key[0]}:{key[1]}" for key in sorted(found)}
    return Lines(
        [text for key, text in texts.items() if found[key]], [text for key, text in texts.items() if not found[key]]
    )


def measure() -> Lines:
    made = library()
    return lines(made, run(made))


if __name__ == "__main__":
    result = measure()
    sys.stdout.write("\n".join([*result.missed, f"{result.share:.1%} of csrc/metal"]) + "\n")
