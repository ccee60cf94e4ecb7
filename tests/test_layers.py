"""Layers look down only: who may include what, as one table."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

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
}
SYSTEM = {"sys", "mach-o"}


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
