"""Prints the folder of metal-cpp's headers in the package mlx-metal, which contains nothing else that mfa uses."""

import sys
from importlib.util import find_spec
from pathlib import Path

spec = find_spec("mlx")
for location in (spec.submodule_search_locations or []) if spec else []:
    headers = Path(location) / "include" / "metal_cpp"
    if (headers / "Metal" / "Metal.hpp").is_file():
        print(headers)
        sys.exit()
sys.exit(
    "metal-cpp is missing: pip install mlx-metal, or set MFA_METAL_CPP_DIR to a folder that contains Metal/Metal.hpp"
)
