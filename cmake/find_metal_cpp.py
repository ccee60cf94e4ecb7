"""Prints the folder of metal-cpp's headers, which the package mlx-metal carries; mfa uses nothing else of it.

MFA_METAL_CPP_DIR has precedence. The package installs on macOS only: elsewhere its wheel is fetched into .cache/ once.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import macos_wheel


def find() -> Path:
    """The folder that contains Metal/Metal.hpp. Raises macos_wheel.FetchError."""
    spec = find_spec("mlx")
    folders = [
        Path(location) / "include" / "metal_cpp" for location in (spec and spec.submodule_search_locations) or ()
    ]
    if chosen := os.environ.get("MFA_METAL_CPP_DIR"):
        folders.insert(0, Path(chosen))
    for folder in folders:
        if (folder / "Metal" / "Metal.hpp").is_file():
            return folder
    if sys.platform == "darwin":
        raise macos_wheel.FetchError("the package mlx-metal is not installed")
    return macos_wheel.metal_cpp(Path(__file__).resolve().parent.parent / ".cache" / "mac-check")


if __name__ == "__main__":
    try:
        print(find())
    except macos_wheel.FetchError as error:
        sys.exit(
            f"metal-cpp is missing: {error}\n"
            "Without a network, set MFA_METAL_CPP_DIR to a folder that contains Metal/Metal.hpp."
        )
