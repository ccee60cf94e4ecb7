"""What the check needs of PyPI: macOS wheels of torch, and binaries that show more symbols."""

import os
import re
import subprocess
import sys
from pathlib import Path

from macos_wheel import METAL_CPP, METAL_CPP_MEMBERS, FetchError, fetch

HERE = Path(__file__).resolve().parent
# The check adds the newest there is.
TORCH = (HERE.parent / "torch_versions.txt").read_text().split()
OLDEST = TORCH[0]
ONNX = "onnxruntime==1.32.0"  # uses much of libc++
NANOBIND = "nanobind-backend==1.0.0"  # what nanobind uses of it

# The headers that the stable ABI consists of. A whole include folder has ten thousand files.
HEADERS = (
    "torch/include/torch/csrc/stable/",
    "torch/include/torch/csrc/inductor/aoti_torch/",
    "torch/include/torch/headeronly/",
)
TORCH_MEMBERS = (*HEADERS, "torch/lib/libtorch_cpu.dylib", "torch/lib/libc10.dylib")


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


def known_good(cache: Path) -> list[Path]:
    """Binaries that run on macOS 14."""
    folders = [
        fetch(METAL_CPP, METAL_CPP_MEMBERS, cache),
        fetch(ONNX, ("onnxruntime/capi/onnxruntime_pybind11_state.so",), cache),
        fetch(NANOBIND, ("nanobind_backend/",), cache),
        torch("2.13.0", cache),
    ]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".so", ".dylib"})
