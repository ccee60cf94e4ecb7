"""Measures pipelines, two at a time or as many as there are cores, and writes the table that the cost model reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check.plans import enumerators

from mfa.bench.registers import PATH

from . import instances
from .emit import Pipeline, ir, translate_cuda
from .measure import MOST_REGISTERS, measure
from .toolchain import MESA, Toolchain

PARAMS = enumerators("Argument")["params"]


def _sources() -> dict[str, translate_cuda.Source]:
    """By kernel, the translated file that has it."""
    return {kernel: source for source in translate_cuda.translate_kernels(instances.METAL) for kernel in source.kernels}


def _row(toolchain: Toolchain, source: translate_cuda.Source, pipeline: Pipeline) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.ll"
        file.write_text(ir(source, pipeline, toolchain.clang, toolchain.environment))
        try:
            measured, least = measure(toolchain.translator, file, pipeline.threads, PARAMS, toolchain.environment)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{pipeline.name}: {error.stderr[-2000:] or error}")
    row = asdict(measured)
    row["loop"] = {kind: count for kind, count in row["loop"].items() if count}
    return {**row, "least_registers": least.registers, "least_stack": least.stack}


def rows(toolchain: Toolchain, pattern: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """By pipeline, in the catalogue's order: all of M1's, or those that match, of the matrix unit as well."""
    wanted = instances.pipelines()
    if pattern is not None:
        known = [*wanted, *instances.pipelines(on_unit=True)]
        wanted = [pipeline for pipeline in known if re.fullmatch(pattern, pipeline.name)]
    sources = _sources()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda pipeline: _row(toolchain, sources[pipeline.kernel], pipeline), wanted)
        yield from zip((pipeline.name for pipeline in wanted), made, strict=True)


def run(toolchain: Toolchain, pattern: str | None) -> None:
    """Prints what it finds; with a pattern, nothing else: the table is of all of them."""
    found = {}
    for name, row in rows(toolchain, pattern):
        found[name] = row
        spills = f"  {row['stack']} stack operations" if row["stack"] else ""
        over = "  more than there are" if row["registers"] > MOST_REGISTERS else ""
        print(f"{name:50}{row['registers']:>4} registers{spills}{over}", flush=True)
    if pattern is None:
        head = {"mesa": MESA, "tool": instances.tool(), "sources": instances.sources()}
        lines = [f'"{name}": {json.dumps(row)}' for name, row in found.items()]
        PATH.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "kernels": {{\n  ' + ",\n  ".join(lines) + "\n }\n}\n")
