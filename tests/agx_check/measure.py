"""What the translator prints of a kernel -> registers, stack operations and instructions of its main loop."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_REGISTERS = 128
# What G13 issues at a quarter or less of the rate of float32: dougallj's and Philip Turner's tables.
SLOW = {"imad", "bfi", "bfeil", "extr", "asr", "shl", "exp2", "log2", "rcp", "rsqrt", "srsqrt", "floor"}
NAMED = {
    "simd_matrix_fmadd": "mma",
    "local_load": "threadgroup_load",
    "local_store": "threadgroup_store",
    "device_load": "device_load",
    "device_store": "device_store",
    "stack_load": "stack",
    "stack_store": "stack",
    "wait": "wait",
    "mov": "move",
    "mov_imm": "move",
    "xor": "move",  # the register allocator's way to swap; that of a kernel is a bitop
}
KINDS = (*dict.fromkeys(NAMED.values()), "arithmetic", "slow", "shuffle", "barrier", "branch")


@dataclass(frozen=True)
class Measured:
    registers: int  # 32-bit, before anything is spilled
    stack: int  # loads and stores, in the main loop
    stack_bytes: int  # that those move, per lane
    loop: Mapping[str, int]  # instructions of the main loop by kind, both arms of every branch


def kind_of(line: str) -> str:
    body = line.split(" = ", 1)[-1]
    opcode = body.split()[0]
    if opcode in NAMED:
        return NAMED[opcode]
    if opcode == "bitop" and body.endswith(", #0, #a"):
        return "move"  # of two registers
    if re.search("shuffle|simd_|ballot", opcode):
        return "shuffle"
    if "barrier" in opcode:
        return "barrier"
    if re.match("if|else|while|pop_exec|jmp|break|stop|logical", opcode):
        return "branch"
    return "slow" if opcode in SLOW else "arithmetic"


def loops(successors: Mapping[int, list[int]]) -> dict[int, set[int]]:
    """Blocks by header. Mesa numbers blocks in order: an edge that does not lead on closes a loop."""
    predecessors = defaultdict(list)
    for block, targets in successors.items():
        for target in targets:
            predecessors[target].append(block)
    found: dict[int, set[int]] = {}
    for latch, targets in successors.items():
        for header in targets:
            if header > latch:
                continue
            body, todo = found.setdefault(header, {header}), [latch]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += predecessors[block]
    return found


def parse(listing: str) -> Measured:
    kinds: dict[int, list[str]] = {}
    stack_words: Counter[int] = Counter()
    successors: dict[int, list[int]] = {}
    demand = registers = block = 0
    for line in listing.splitlines():
        if line.startswith("BLOCK"):
            block, *successors[block] = map(int, line.split()[1:])
            kinds[block] = []
        elif line.startswith("DEMAND"):
            demand = int(line.split()[1])
        elif line.startswith("RESULT"):
            registers = int(line.split()[2])
        elif line.startswith("   "):
            kinds[block].append(kind_of(line.strip()))
            if mask := re.search(r"stack_(?:load|store) .*, ([xyzw]+),", line):
                stack_words[block] += len(mask[1])
    multiplying = {block for block, found in kinds.items() if "mma" in found}
    candidates = list(loops(successors).values())
    candidates = [body for body in candidates if body & multiplying] or candidates
    body = min(candidates, key=len, default=set())
    counts = Counter(kind for block in body for kind in kinds[block])
    needed = max(demand, registers if demand <= 2 * MOST_REGISTERS else 0)
    stack_bytes = 4 * sum(stack_words[block] for block in body)
    return Measured(-(-needed // 2), counts["stack"], stack_bytes, {kind: counts[kind] for kind in KINDS})


def measure(
    translator: Path, ir: Path, threads: int, params_index: int, environment: Mapping[str, str]
) -> list[Measured]:
    """As compiled, and with 64-bit uniforms moved to registers at each use. Raises subprocess.CalledProcessError."""
    command = [str(translator), str(ir), str(threads), str(params_index)]
    return [
        parse(subprocess.run([*command, *more], capture_output=True, text=True, check=True, env=environment).stdout)
        for more in ([], ["rematerialise"])
    ]
