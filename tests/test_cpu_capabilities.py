"""The CPU tests on lesser CPUs: ATen's kernels and BLAS have other instructions there, and round otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = (
    "test_cpu.py",
    "test_attention.py",
    "test_backward.py",
    "test_varlen.py",
    "test_varlen_paged.py",
    "test_kv_cache.py",
    "test_latents.py",
    "test_wide_heads.py",
    "test_block_attention.py",
)
ENVIRONMENTS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env={**inherited, **environment}, cwd=TESTS.parent, capture_output=True, text=True, timeout=1800
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", ENVIRONMENTS)
def test_numerics_hold(capability: str) -> None:
    environment = ENVIRONMENTS[capability]
    asked = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    found = run("-c", asked, environment=environment).stdout.strip()
    if found != capability:
        pytest.skip(f"this CPU has no {capability}: torch's capability is {found}")
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow and not mps", "-k", "cpu and not memory")
    child = run("-m", "pytest", *(str(TESTS / file) for file in FILES), *options, environment=environment)
    summary = child.stdout[-20_000:]
    assert child.returncode == 0, summary
    passed = re.search(r"^(\d+) passed", summary, re.MULTILINE)  # pytest is content where all are skipped
    assert passed is not None, summary
    assert int(passed[1]) >= 50, summary
