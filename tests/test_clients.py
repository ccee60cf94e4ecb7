"""Packages of other projects on mfa: each is installed where only its own test sees it, beside our torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers needs Python 3.11")]

TRAINING = ["accelerate==1.15.0", "peft==0.21.2", "psutil==7.2.2"]
# Exact, and with all that they import and this environment lacks: none may bring another torch.
REQUIREMENTS = {
    "timm": ["timm==1.0.31", "torchvision==0.28.0"],
    "peft": TRAINING,
    "trl": [
        *TRAINING,
        *("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"),
        *("pandas==3.1.1", "pyarrow==26.0.1", "xxhash==4.1.0"),
    ],
}


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_client(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"  # by this name dill knows what isn't to be pickled
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    # A version is exact already: constraints in pip's configuration can only be in the way.
    installed = subprocess.run(
        [*pip, *REQUIREMENTS[name]], env={**os.environ, "PIP_CONSTRAINT": os.devnull}, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"pip doesn't get {name}: {installed.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    code = f"import client_cases; client_cases.{name}()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
