"""What the check needs of PyPI: macOS wheels of torch, metal-cpp's headers, and binaries that show more symbols."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The check adds the newest there is.
TORCH = (HERE.parent / "torch_versions.txt").read_text().split()
OLDEST = TORCH[0]
PYPROJECT = (HERE.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
(METAL_CPP,) = re.findall(r"mlx-metal==[\d.]+", PYPROJECT)
METAL_CPP_MEMBERS = ("mlx/include/metal_cpp/", "mlx/lib/libmlx.dylib")
ONNX = "onnxruntime==1.32.0"  # uses much of libc++
NANOBIND = "nanobind-backend==1.0.0"  # what nanobind uses of it

# The headers that the stable ABI consists of. A whole include folder has ten thousand files.
HEADERS = (
    "torch/include/torch/csrc/stable/",
    "torch/include/torch/csrc/inductor/aoti_torch/",
    "torch/include/torch/headeronly/",
)
TORCH_MEMBERS = (*HEADERS, "torch/lib/libtorch_cpu.dylib", "torch/lib/libc10.dylib")


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


def newest_torch() -> str:
    """The newest release in the package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = re.match(r"torch \(([\d.]+)", done.stdout)
    if found is None:
        raise FetchError(f"pip can't say which torch is the newest:\n{done.stderr.strip() or done.stdout}")
    return found[1]


def torch(version: str, cache: Path) -> Path:
    """A torch folder: include/ and lib/libtorch_cpu.dylib."""
    return fetch(f"torch=={version}", TORCH_MEMBERS, cache) / "torch"


def metal_cpp(cache: Path) -> Path:
    return fetch(METAL_CPP, METAL_CPP_MEMBERS, cache) / "mlx/include/metal_cpp"


def known_good(cache: Path) -> list[Path]:
    """Binaries that run on macOS 14."""
    folders = [
        fetch(METAL_CPP, METAL_CPP_MEMBERS, cache),
        fetch(ONNX, ("onnxruntime/capi/onnxruntime_pybind11_state.so",), cache),
        fetch(NANOBIND, ("nanobind_backend/",), cache),
        torch("2.13.0", cache),
    ]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".so", ".dylib"})
