"""A module of this package in a new process: a process asks but once what machine it is on."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: str, **environment: str) -> str:
    """What `python -m driver.MODULE` prints. Raises subprocess.CalledProcessError."""
    variables = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    command = [sys.executable, "-m", f"driver.{module}", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
