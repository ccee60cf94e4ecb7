"""make mac-check."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "cmake"))  # macos_wheel.py is the build's own
