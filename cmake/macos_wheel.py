"""Fetches macOS wheels from PyPI, wherever this runs: for metal-cpp's headers, and for `make mac-check`."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PYPROJECT = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
(METAL_CPP,) = re.findall(r"mlx-metal==[\d.]+", PYPROJECT)
METAL_CPP_MEMBERS = ("mlx/include/metal_cpp/", "mlx/lib/libmlx.dylib")


class FetchError(Exception):
    """What can't be fetched, and pip's reason."""


def fetch(requirement: str, members: tuple[str, ...], cache: Path) -> Path:
    """The folder with those members (files, or prefixes of folders) of the macOS wheel of `requirement`."""
    folder = cache / requirement.replace("==", "-")
    if (folder / ".complete").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # This machine's constraints are about what is installed here; the wheel is for another operating system.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    platforms = [f"--platform=macosx_{major}_0_arm64" for major in (11, 12, 13, 14)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", *platforms]
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", temporary, requirement]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip() or f"pip exits with {done.returncode}"
            raise FetchError(f"pip can't download the macOS wheel of {requirement}:\n{reason}")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(members)]
            if not names:
                raise FileNotFoundError(f"{wheel.name} contains none of {members}")
            archive.extractall(folder, names)
    (folder / ".complete").touch()
    return folder


def metal_cpp(cache: Path) -> Path:
    """The folder that contains Metal/Metal.hpp."""
    return fetch(METAL_CPP, METAL_CPP_MEMBERS, cache) / "mlx/include/metal_cpp"
