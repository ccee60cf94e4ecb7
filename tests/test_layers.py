"""Layers look down only: who may include or import what, as one table for C++ and one for Python."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = "src/mfa"

# A room, or a file -> the rooms, files and libraries that it may include. The innermost row holds. Headers of the C++
# standard library and of the operating system are everybody's.
INCLUDES = {
    "csrc/library.cpp": {"csrc/ops", "torch"},
    "csrc/ops": {"csrc/ops", "csrc/plan", "torch"},  # reaches Metal through csrc/plan/launcher.h
    "csrc/plan": {"csrc/plan", "metal/params.h", "metal/geometry.h", "metal/instances.def"},
    "csrc/metal": {"csrc/metal", "csrc/plan", "Metal", "Foundation", "torch"},
    "csrc/python": {"csrc/python", "csrc/plan", "nanobind", "csrc/simulator/metal_launcher.h"},
    "csrc/simulator": {"csrc/simulator"},
    # The one door: a launcher like any other, made of csrc/metal and the driver.
    "csrc/simulator/metal_launcher.h": {"csrc/simulator", "csrc/plan"},
    "csrc/simulator/metal_launcher.cpp": {"csrc/simulator", "csrc/plan", "csrc/metal"},
    "csrc/simulator/mps_device": {"csrc/simulator", "torch", "ATen", "c10"},
    "metal": {"metal", "metal_stdlib"},
    "metal/unit": {"metal", "MetalPerformancePrimitives"},
}
SYSTEM = {"sys", "mach-o"}

# The same of src/mfa: a room, or a module -> the rooms, modules, and names in modules that it may import.
LEAVES = {"_arguments.py", "_torch.py", "_log.py", "block_mask.py"}
BELOW = {"_checks", "_cpu", "_ops", "_simulation.py", *LEAVES}
FUNCTIONS = {  # what users call, for the drop-ins
    "attention.py/attention",
    "device.py",
    "kv_cache.py/attention_with_kv_cache",
    "merge.py/merge_attention",
    "pipelines.py",
    "varlen.py/attention_varlen",
}
DROP_IN = {*FUNCTIONS, "_checks", "_simulation.py", *LEAVES}
IMPORTS = {
    "_arguments.py": set(),
    "_torch.py": set(),
    "_log.py": set(),
    "block_mask.py": set(),
    "masks.py": set(),
    "_library.py": {"_native"},
    "_metal.py": {"_library.py", "_log.py", "_native"},
    # The one door: what the simulator enters itself in. None but applications import the simulator.
    "_simulation.py": {"_library.py", "_native"},
    "simulator.py": {"_simulation.py", "_library.py", "_log.py", "_torch.py", "_native"},
    "_checks": {"_checks", "_arguments.py", "_simulation.py", "_torch.py"},
    "_remembered.py": {"block_mask.py"},
    "_cpu": {"_cpu", "_checks", "_arguments.py", "_log.py", "block_mask.py", "quantize.py/quantize_kv"},
    "_ops": {*BELOW, "_library.py"},
    "_parallel": {*BELOW, "_parallel", "merge.py/merge_attention"},
    # The functions that users call, each by itself.
    "attention.py": {*BELOW, "_remembered.py"},
    "varlen.py": BELOW,
    "kv_cache.py": BELOW,
    "checkpointing.py": {"_ops/__init__.py/ops"},
    "context_parallel.py": {*BELOW, "_parallel"},
    "flex.py": {"attention.py/attention", "block_mask.py", "_log.py"},
    "merge.py": {"_checks"},
    "quantize.py": {"_checks"},
    "device.py": {"_metal.py"},
    "pipelines.py": {"_metal.py", "_native"},
    "support.py": {"_checks", "_native"},
    # Others' interfaces over them.
    "sdpa": {*DROP_IN, "sdpa", "_ops/__init__.py/ops", "_ops/sharding.py"},
    "flash_attn": {*DROP_IN, "flash_attn", "_ops/__init__.py/ops"},
    "mps_flash_attn": {*DROP_IN, "mps_flash_attn", "sdpa"},
    "transformers": {*DROP_IN, "transformers"},
    "diffusers.py": {*DROP_IN, "transformers"},
    # Applications.
    "__init__.py": {"."},
    "__main__.py": {"."},
    "demo.py": {"__init__.py", "attention.py", "simulator.py"},
    "bench": {
        *("__init__.py", "bench", "attention.py", "sdpa/policy.py"),
        *("simulator.py", "_library.py", "_native", "_torch.py", "transformers"),
    },
}


def is_in(path: str, place: str) -> bool:
    return PurePosixPath(path).is_relative_to(place)


def looking_up(uses: Iterable[tuple[str, str]], table: dict[str, set[str]]) -> list[str]:
    """Of pairs (file, what it uses), those that the table doesn't allow. Paths are from the repository's root."""
    found = []
    for file, used in uses:
        room = max((room for room in table if is_in(file, room)), key=len, default=None)
        if room is None or not any(is_in(used, place) for place in table[room]):
            found.append(f"{file} uses {used}")
    return found


def resolved(file: Path, name: str) -> str:
    """A header of ours, from the root. Names are paths from csrc/; in metal/ and the simulator also from the file."""
    path = file.relative_to(ROOT).as_posix()
    folders = [file.parent, CSRC] if is_in(path, "metal") or is_in(path, "csrc/simulator") else [CSRC]
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).resolve().relative_to(ROOT).as_posix()
    return f'"{name}", which is not there'


def library(name: str) -> str | None:
    """Of a header in angle brackets; None if it is the C++ standard library's or the operating system's."""
    first, *rest = name.split("/")
    if rest:
        return None if first in SYSTEM else first
    return "metal_stdlib" if first.startswith("metal_") else None


def includes() -> Iterator[tuple[str, str]]:
    for folder in ("csrc", "metal"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix not in {".h", ".cpp", ".def", ".metal"}:
                continue
            for quote, name in re.findall(r'^\s*#\s*include\s+(["<])([^">]+)[">]', file.read_text(), re.MULTILINE):
                used = resolved(file, name) if quote == '"' else library(name)
                if used is not None:
                    yield file.relative_to(ROOT).as_posix(), used


def test_no_include_looks_up() -> None:
    found = list(includes())
    assert len(found) > 100
    assert looking_up(found, INCLUDES) == []


@pytest.mark.parametrize(
    ("file", "used"),
    [
        ("csrc/plan/plan.h", "torch"),
        ("csrc/plan/plan.h", "Metal"),
        ("csrc/plan/plan.h", "metal/forward.h"),
        ("csrc/plan/problem.cpp", "csrc/ops/operands.h"),
        ("csrc/ops/operands.h", "csrc/metal/launch.h"),
        ("csrc/ops/operands.h", "Foundation"),
        ("csrc/metal/launch.cpp", "csrc/simulator/metal_launcher.h"),
        ("csrc/python/bindings.cpp", "csrc/simulator/engine.h"),
        ("csrc/simulator/engine.h", "csrc/plan/plan.h"),
        ("metal/forward.h", "csrc/plan/plan.h"),
        ("csrc/new.cpp", "csrc/plan/plan.h"),
    ],
)
def test_one_that_looks_up_is_found(file: str, used: str) -> None:
    assert looking_up([(file, used)], INCLUDES) == [f"{file} uses {used}"]


def imported(module: ast.ImportFrom, file: Path, package: Path) -> Iterator[str]:
    """What a relative import takes, from the package: `_log.py` for a module, `_log.py/once` for a name in one."""
    folder = file.parents[module.level - 1].joinpath(*(module.module or "").split("."))
    for alias in module.names:
        if "_native" in (module.module, alias.name):  # compiled
            yield "_native"
            continue
        for path, name in ((folder / alias.name, ""), (folder, alias.name)):
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if source.is_file():
                yield (source.relative_to(package) / name).as_posix()
                break
        else:
            yield f"{module.module}.{alias.name}, which is not there"


def imports(package: Path) -> Iterator[tuple[str, str]]:
    """Those inside of functions, and for types, as well."""
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                for used in imported(node, file, package):
                    yield file.relative_to(package).as_posix(), used


def circle(uses: Iterable[tuple[str, str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none if there is no circle."""
    graph: dict[str, set[str]] = {}
    for file, used in uses:
        module = used if used.endswith(".py") else used.rpartition("/")[0]  # of a name
        graph.setdefault(file, set()).add(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_import_looks_up() -> None:
    found = list(imports(ROOT / PACKAGE))
    assert len(found) > 100
    assert looking_up(found, IMPORTS) == []


def test_nothing_is_imported_in_a_circle() -> None:
    assert circle(imports(ROOT / PACKAGE)) == []
    assert set(circle([("a.py", "b.py/f"), ("b.py", "c.py"), ("c.py", "a.py/g")])) == {"a.py", "b.py", "c.py"}


@pytest.mark.parametrize(
    ("file", "line", "used"),
    [
        ("_cpu/forward.py", "from .._ops import dense", "_ops/dense.py"),
        ("_checks/dense.py", "from .._cpu.blocks import HIDDEN", "_cpu/blocks.py/HIDDEN"),
        ("_checks/dense.py", "from .._ops import ops", "_ops/__init__.py/ops"),
        ("_ops/dense.py", "from .. import simulator", "simulator.py"),
        ("attention.py", "def f():\n    from .simulator import Simulation", "simulator.py/Simulation"),
        ("sdpa/__init__.py", "from .. import simulator", "simulator.py"),
        ("sdpa/varlen.py", "from ..attention import _composite", "attention.py/_composite"),
        ("flash_attn/__init__.py", "from .._cpu.forward import attention_forward", "_cpu/forward.py/attention_forward"),
        ("transformers/__init__.py", "from .. import _metal", "_metal.py"),
        ("_torch.py", "from . import _native", "_native"),
        ("new.py", "from .attention import attention", "attention.py/attention"),
    ],
)
def test_an_import_that_looks_up_is_found(tmp_path: Path, file: str, line: str, used: str) -> None:
    for module in (ROOT / PACKAGE).rglob("*.py"):
        copy = tmp_path / module.relative_to(ROOT / PACKAGE)
        copy.parent.mkdir(exist_ok=True)
        copy.touch()
    (tmp_path / file).write_text(line)
    assert looking_up(imports(tmp_path), IMPORTS) == [f"{file} uses {used}"]
