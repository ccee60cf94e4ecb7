"""The tests that mps-flash-attn ships in its sdist, with mfa.mps_flash_attn in that package's place."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REQUIREMENT = "mps-flash-attn==0.5.2"
CONFTEST = """
import sys, mfa.mps_flash_attn, mfa.mps_flash_attn.benchmark

mfa.mps_flash_attn.is_available = lambda: True
sys.modules["mps_flash_attn"] = mfa.mps_flash_attn
sys.modules["mps_flash_attn.benchmark"] = mfa.mps_flash_attn.benchmark
"""
# They need a Mac: here their tensors are on the CPU.
ON_CPU = {
    r"torch\.backends\.mps\.is_available\(\)": "True",
    r"torch\.mps\.synchronize\(\)": "None",
    r"device=(['\"])mps\1": 'device="cpu"',
}
EXPECTED = {  # to fail, and why
    "TestVersionConsistency::test_version_matches_setup": "mfa.mps_flash_attn has the interface of a later version",
    "TestInputValidation::test_wrong_device_raises": "all of its tensors are on one device here",
    "TestCustomOp::test_torch_compile": "it calls the op torch.ops.mfa.forward: mfa's own are others",
}


def test_their_tests(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary=:all:"]
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    command = [*pip, f"--dest={tmp_path}", REQUIREMENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip doesn't get {REQUIREMENT}: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("*/tests")
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for pattern, replacement in ON_CPU.items():
            text = re.sub(pattern, replacement, text)
        file.write_text(text, encoding="utf-8")
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    options = ["-q", "-rA", "--tb=short", "--rootdir=.", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=folder, capture_output=True, text=True, env={**os.environ}
    )
    outcomes = dict(
        reversed(row) for row in re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    )
    assert {name for name, outcome in outcomes.items() if outcome != "PASSED"} == set(EXPECTED), done.stdout
    assert len(outcomes) >= 80
