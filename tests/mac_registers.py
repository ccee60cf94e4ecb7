"""Registers of every pipeline by Apple's own compiler, for each of its GPU generations: needs Xcode, but no such GPU.

metal-tt(1) translates a metallib for a family of GPUs, after a metal-pipelines-script(5) that names a kernel and its
function constants; metal-lipo(1) takes out the code for one chip: a Mach-O whose section __compute is a Mach-O again.
In there the compiler leaves a FlatBuffer about the kernel. Its layout is Apple's and undocumented; four public tools
read it at the same places, on M1, M4, A18 Pro and M5, and find the registers and spills that Xcode shows.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import lief
from agx_check.emit import Pipeline
from agx_check.instances import constants_of, pipelines, sources
from flatbuffers.number_types import Uint32Flags
from flatbuffers.table import Table

from mfa.bench import kernels, registers

FAMILIES = ("apple7", "apple8", "apple9", "apple10")
UNIT_FAMILY = "apple10"
REGISTERS, SPILL_BYTES = 0, 14  # slots of the table that slot 0 of the root refers to
MOST_REGISTERS = 256  # what any instruction can name


class Compiled(NamedTuple):
    registers: int  # 32-bit, per thread
    spill_bytes: int  # of scratch memory, per thread
    code_bytes: int


def script(metallib: Path, pipeline: Pipeline) -> dict[str, Any]:
    """A pipelines script."""
    values = [
        {
            "id_type": "FunctionConstantIndex",
            "id": {"data": index},
            "value_type": "ConstantBool",
            "value": {"data": value},
        }
        for index, value in constants_of(pipeline).items()
    ]
    special = {"label": "pipeline", "function": f"alias:mfa#{pipeline.kernel}", "constant_values": values}
    return {
        "libraries": {"paths": [{"label": "mfa", "path": str(metallib)}], "specialized_functions": [special]},
        "pipelines": {"compute_pipelines": [{"compute_function": f"alias:pipeline#{pipeline.kernel}"}]},
    }


def section(binary: bytes, segment: str, name: str) -> bytes:
    """Raises ValueError where a Mach-O has no such section."""
    parsed = lief.MachO.parse(list(binary))
    found = [
        section
        for part in parsed or ()
        for section in part.sections
        if (section.segment_name, section.name) == (segment, name)
    ]
    if len(found) != 1:
        raise ValueError(f"not one section {segment},{name}, but {len(found)}")
    return bytes(found[0].content)


def read(binary: bytes) -> Compiled:
    """Of one chip's code. Raises ValueError where it is not laid out as described above."""
    code = section(binary, "__TEXT", "__compute")
    metadata = section(code, "__GPU_METADATA", "__compute")
    root = Table(metadata, 0)
    root.Pos = root.Indirect(0)
    field = root.Offset(4)
    if not field:
        raise ValueError("the compiler's metadata has no table of the kernel")
    info = Table(metadata, root.Indirect(root.Pos + field))

    def slot(index: int) -> int:
        offset = info.Offset(4 + 2 * index)
        return info.Get(Uint32Flags, info.Pos + offset) if offset else 0

    found = Compiled(slot(REGISTERS), slot(SPILL_BYTES), len(section(code, "__TEXT", "__text")))
    if not 0 < found.registers <= MOST_REGISTERS:
        raise ValueError(f"the compiler's metadata has another layout: {found.registers} registers")
    return found


def tool(*command: str) -> str:
    """What an Xcode tool prints. Raises subprocess.CalledProcessError, or OSError without Xcode."""
    done = subprocess.run(["xcrun", "-sdk", "macosx", *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compiled(metallib: Path, pipeline: Pipeline, family: str) -> dict[str, Compiled]:
    """By chip of a family, for example applegpu_g13s."""
    with tempfile.TemporaryDirectory() as folder:
        plan, archive, thin = (Path(folder) / name for name in ("kernel.mtlp-json", "all.gpubin", "one.gpubin"))
        plan.write_text(json.dumps(script(metallib, pipeline)))
        version = tool("--show-sdk-version")
        platform = ("-platform_version", "macos", version, version)
        tool("metal-tt", "-gpu-family", family, *platform, str(plan), "-o", str(archive))
        found = {}
        for chip in tool("metal-lipo", str(archive), "-archs").split():
            if chip.startswith("applegpu_"):
                tool("metal-lipo", str(archive), "-thin", chip, "-output", str(thin))
                found[chip] = read(thin.read_bytes())
        return found


def _row(metallib: Path, pipeline: Pipeline, family: str) -> dict[str, Compiled | str]:
    try:
        return dict(compiled(metallib, pipeline, family))
    except subprocess.CalledProcessError as error:
        return {family: (error.stderr or error.stdout).strip()[-500:]}
    except ValueError as error:
        return {family: str(error)}


def _of_family(
    metallib: Path, wanted: list[Pipeline], family: str
) -> Iterator[tuple[Pipeline, dict[str, Compiled | str]]]:
    """By chip; by family why there is none. One whose first pipeline fails is given up."""
    first, *others = wanted
    row = _row(metallib, first, family)
    yield first, row
    if family not in row:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from zip(others, pool.map(lambda each: _row(metallib, each, family), others), strict=True)


def report(
    metallib: Path, unit_metallib: Path | None = None, families: tuple[str, ...] = FAMILIES
) -> dict[str, dict[str, Compiled | str]]:
    """By chip and pipeline; by family and pipeline, why there is none. The unit's are for M5 alone.

    Raises OSError without Xcode.
    """
    found: dict[str, dict[str, Compiled | str]] = {}
    tried = [(metallib, pipelines(), family) for family in families]
    if unit_metallib is not None:
        tried += [(unit_metallib, pipelines(on_unit=True), UNIT_FAMILY)]
    for library, wanted, family in tried:
        for pipeline, row in _of_family(library, wanted, family):
            for chip, compiled_row in row.items():
                found.setdefault(chip, {})[pipeline.name] = compiled_row
    return found


def unit_chip(chips: Iterable[str]) -> str | None:
    """Of M5's, but a phone's, which mfa doesn't let use its unit: that of M5 Pro, if it is among them."""
    return max((chip for chip in chips if re.fullmatch(r"applegpu_g17[^p]", chip)), default=None)


def rows_on_unit(chips: dict[str, dict[str, Any]]) -> dict[str, registers.OnUnit]:
    """By pipeline, of a report: those that the cost model has."""
    counted, rows = kernels.counted(), chips.get(unit_chip(chips) or "", {})
    return {
        name: registers.OnUnit(*row[:2], counted[name].counted)
        for name, row in rows.items()
        if name in counted and counted[name].unit_mma and not isinstance(row, str)
    }


def changes(before: dict[str, kernels.Kernel], after: dict[str, kernels.Kernel]) -> list[str]:
    """Lines: rows of the cost model that Apple's compiler replaces."""

    def words(kernel: kernels.Kernel) -> str:
        return f"{kernel.registers} registers, {kernel.stack_bytes} bytes of stack per step"

    return [
        f"{name}: {words(kernel)}; Apple's: {words(after[name])}"
        for name, kernel in before.items()
        if after[name] != kernel
    ]


def main() -> None:
    """Takes a report's registers into the cost model, and prints the rows that they replace there: those of the open
    compiler for M1, and for M5's matrix unit estimates."""
    parser = argparse.ArgumentParser(prog="mac_registers", description=main.__doc__)
    parser.add_argument("report", type=Path, help="mac-report.json, which `make mac` wrote from these sources")
    chips = json.loads(parser.parse_args().report.read_text())["registers"]["result"]
    before = kernels.load()
    lines = [f'"{name}": {json.dumps(row[:2])}' for name, row in chips[registers.CHIP].items()]
    unit = [f'"{name}": {json.dumps(row)}' for name, row in rows_on_unit(chips).items()]
    head = json.dumps({"sources": sources()})[:-1]
    sections = ['"kernels": {\n' + ",\n".join(lines) + "\n}", '"unit": {\n' + ",\n".join(unit) + "\n}"]
    registers.APPLE.write_text(f"{head}, " + ", ".join(sections) + "}\n")
    for line in changes(before, kernels.load()) or ["no row of the cost model changes"]:
        print(line)


if __name__ == "__main__":
    main()
