"""Runs tests/mps on the stand-in `mps` device, in a process of its own: torch caches whether there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mfa
from mfa import _metal

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.xdist_group("driver")
@pytest.mark.skipif(sys.platform != "linux", reason="on a Mac there is no need of a stand-in")
def test_on_the_stand_in(tmp_path: Path) -> None:
    if _metal.info() is None:
        pytest.skip(f"libmfa has no Metal backend in this build: {mfa.device_info().why_not}")
    environment = {**os.environ, "PYTHONPATH": str(HERE), "MFA_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "driver.stand_in",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(HERE / "mps")], env=environment, capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
