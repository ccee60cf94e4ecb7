"""Metal 4 sources of the probes -> metallibs, by Xcode's compiler and with the flags of the package's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
METAL = ROOT / "metal"
# As cmake/MetalLibrary.cmake has them.
FLAGS = ("-std=metal4.0", "-mmacosx-version-min=26.2", "-fno-fast-math", "-Wno-c++20-extensions")


class Patch(NamedTuple):
    """A text of a kernel header, which is there once, and what takes its place."""

    file: str  # below metal/
    old: str
    new: str


class CompileError(Exception):
    """What Metal's compiler said."""


def toolchain() -> dict[str, str]:
    """The environment in which xcrun finds Metal's compiler."""
    script = ("sh", str(ROOT / "cmake" / "metal_toolchain.sh"))
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    found = done.stdout.strip() if done.returncode == 0 else ""
    return {**os.environ, "TOOLCHAINS": found} if found else dict(os.environ)


def metallib(source: Path, include: Path = METAL) -> Path:
    """Beside the source. Raises CompileError."""
    output = source.with_suffix(".metallib")
    command = ["xcrun", "-sdk", "macosx", "metal", *FLAGS, f"-I{include}", str(source), "-o", str(output)]
    done = subprocess.run(command, env=toolchain(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr[:4000])
    return output


def patched(folder: Path, patches: Iterable[Patch]) -> Path:
    """A copy of metal/ with other texts. Raises ValueError where one isn't there once."""
    copy = folder / "metal"
    shutil.copytree(METAL, copy)
    for patch in patches:
        file = copy / patch.file
        text = file.read_text(encoding="utf-8")
        if text.count(patch.old) != 1:
            raise ValueError(f"metal/{patch.file} has {patch.old!r} {text.count(patch.old)} times, not once")
        file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")
    return copy
