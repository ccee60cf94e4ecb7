"""Registers of every kernel on M1, by an open-source compiler for its GPU: the table that the cost model reads.

Compiled, not measured: see docs/registers.md for how, and how far to trust it. `make agx-check` writes it.
"""

import json
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("registers.json")
MOST = 128  # that a thread has


class Registers(NamedTuple):
    """Of one pipeline."""

    registers: int  # 32-bit, per lane, before anything is spilled
    stack: int  # loads and stores of the stack in the main loop
    stack_bytes: int  # that those move, per lane
    loop: dict[str, int]  # instructions of the main loop by kind, both arms of every branch
    least_registers: int  # with 64-bit uniforms moved to registers at each use: a lower bound
    least_stack: int


def load(path: Path = PATH) -> dict[str, Registers]:
    """By pipeline: a kernel's name, or that of a variant of it, which follows a slash."""
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return {name: Registers(**row) for name, row in kernels.items()}


def of_kernels(path: Path = PATH) -> dict[str, Registers]:
    """By kernel: of its variants the one that takes most."""
    found: dict[str, Registers] = {}
    for name, row in load(path).items():
        kernel = name.split("/")[0]
        found[kernel] = max(found.get(kernel, row), row, key=lambda each: each[:3])
    return found
