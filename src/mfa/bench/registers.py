"""Registers of every kernel on M1, by an open-source compiler for its GPU: the table that the cost model reads.

Compiled, not measured: see docs/registers.md for how, and how far to trust it. `make agx-check` writes it. Where a Mac
has said what Apple's own compiler makes of the kernels (tests/mac_registers.py), that counts.
"""

import json
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("registers.json")
APPLE = Path(__file__).with_name("registers_apple.json")  # absent before the first report of a Mac
CHIP = "applegpu_g13s"  # that it is of: M1 Pro and Max
MOST = 128  # that a thread has


class Registers(NamedTuple):
    """Of one pipeline."""

    registers: int  # 32-bit, per lane, before anything is spilled
    stack: int  # loads and stores of the stack in the main loop
    stack_bytes: int  # that those move, per lane
    loop: dict[str, int]  # instructions of the main loop by kind, both arms of every branch
    least_registers: int  # with 64-bit uniforms moved to registers at each use: a lower bound
    least_stack: int


def stack_of(spill_bytes: int) -> tuple[int, int]:
    """Loads and stores of a step, and their bytes.

    Apple's compiler says what goes to the stack, not how often: taken to be written and read once.
    """
    moved = 2 * spill_bytes
    return -(-moved // 16), moved


def load(path: Path = PATH, apple: Path = APPLE) -> dict[str, Registers]:
    """By pipeline: a kernel's name, or that of a variant of it, which follows a slash.

    What Apple's compiler said counts as long as the kernels are those that it compiled.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    found = {name: Registers(**row) for name, row in table["kernels"].items()}
    theirs = json.loads(apple.read_text(encoding="utf-8")) if apple.exists() else {}
    if theirs.get("sources") == table["sources"]:
        for name, (registers, spill_bytes) in theirs["kernels"].items():
            stack, stack_bytes = stack_of(spill_bytes)
            found[name] = found[name]._replace(registers=registers, stack=stack, stack_bytes=stack_bytes)
    return found


class OnUnit(NamedTuple):
    """Of a kernel for M5's matrix unit, which the open compiler doesn't know: Apple's, or none."""

    registers: int
    spill_bytes: int
    counted: str  # what kernels.py counted of the kernel that Apple compiled


def on_unit(apple: Path = APPLE) -> dict[str, OnUnit]:
    """By pipeline."""
    theirs = json.loads(apple.read_text(encoding="utf-8")) if apple.exists() else {}
    return {name: OnUnit(*row) for name, row in theirs.get("unit", {}).items()}


def of_kernels(path: Path = PATH) -> dict[str, Registers]:
    """By kernel: of its variants the one that takes most."""
    found: dict[str, Registers] = {}
    for name, row in load(path).items():
        kernel = name.split("/")[0]
        found[kernel] = max(found.get(kernel, row), row, key=lambda each: each[:3])
    return found
