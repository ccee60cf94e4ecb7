"""docs/registers.md's table, of src/mfa/bench/registers.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mfa import _native
from mfa.bench import model, registers
from mfa.bench.registers import Registers

ROOT = Path(__file__).parents[2]
FORMS = {  # of names, by the arguments of a row of csrc/plan/tuning.def
    "FORWARD": "forward_{1}_d{2}_v{3}_{4}_s{5}_r{6}_k{7}",
    "DELTA": "backward_delta_{1}_s{2}",
    "DKDV": "backward_dkdv_{1}_d{2}_v{3}_{4}_s{5}_r{6}_q{7}",
    "DQ": "backward_dq_{1}_d{3}_v{4}_{2}_{5}_s{6}_r{7}_k{8}",
    "DQ_FROM_DS": "backward_dq_from_ds_{1}_d{2}_s{3}_q{4}_k{5}",
    "DBIAS": "backward_dbias_{1}_d{2}_v{3}_{4}_s{5}_k{6}",
    "MASK_BLOCKS": "mask_blocks_{1}_s{2}",
}
COLUMNS = {
    "MMA": ("mma",),
    "moves": ("move",),
    "arithmetic": ("arithmetic",),
    "slow": ("slow",),
    "lanes": ("shuffle",),
    "threadgroup": ("threadgroup_load", "threadgroup_store"),
    "device": ("device_load", "device_store"),
    "branches": ("branch",),
}


def tuned() -> set[str]:
    """Kernels that tuning.def names."""
    text = (ROOT / "csrc/plan/tuning.def").read_text(encoding="utf-8")
    rows = re.findall(r"^TUNE_(\w+)\((\w+, \w+, .*)\)$", text, re.MULTILINE)
    names = {(macro, FORMS[macro].format(*arguments.split(", "))) for macro, arguments in rows if macro in FORMS}
    return {name if macro == "FORWARD" else name.replace("_staged", "") for macro, name in names}


def chosen() -> set[str]:
    """Kernels that a plan takes by itself: the others are alternatives, for the autotuner."""
    names = tuned()
    has_choice = {instance.kind for instance in _native.catalogue() if instance.name in names}
    return names | {instance.name for instance in _native.catalogue() if instance.kind not in has_choice}


def spilling(table: dict[str, Registers]) -> list[str]:
    """Pipelines of chosen kernels with loads or stores of the stack in their main loop."""
    return [name for name, row in table.items() if row.stack and name.split("/")[0] in chosen()]


def _cells(table: dict[str, Registers]) -> Iterator[list[str]]:
    threads = {instance.name: instance.threads for instance in _native.catalogue()}
    taken = chosen()
    for name, row in table.items():
        kernel = name.split("/")[0]
        held = model.threads_per_core(row.registers)
        yield [
            f"`{name}`" + ("" if kernel in taken else " (alternative)"),
            f"{row.registers} ({row.least_registers})",
            f"{row.stack} ({row.least_stack})" if row.stack else "0",
            f"{held}",
            f"{held // threads[kernel]}",
            *(str(sum(row.loop.get(kind, 0) for kind in kinds)) for kinds in COLUMNS.values()),
        ]


def markdown() -> str:
    table = registers.load()
    head = ["kernel", "registers (least)", "stack (least)", "threads per core", "threadgroups", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in _cells(table)])


def summary() -> str:
    """By dtype, the chosen kernels that use the stack in their main loop."""
    table = registers.load()
    lines = [
        "| dtype | pipelines of chosen kernels | of those with stack operations in the main loop |",
        "| --- | ---: | ---: |",
    ]
    for dtype in ("f16", "bf16", "f32"):
        all_of = [name for name in table if f"_{dtype}_" in name and name.split("/")[0] in chosen()]
        lines.append(f"| {dtype} | {len(all_of)} | {len(set(all_of) & set(spilling(table)))} |")
    return "\n".join(lines)
