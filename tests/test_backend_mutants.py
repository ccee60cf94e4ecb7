"""Defects planted in csrc/metal, which the driver must find: some of them still give right numbers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from driver import build

pytestmark = [pytest.mark.simulator, pytest.mark.slow]

BIND = "encoder.setBuffer(static_cast<const MTL::Buffer*>(arguments[index].storage), arguments[index].offset, index);"
TAKE = "auto function = NS::TransferPtr(library.newFunction("

# What is planted -> (file, old text, new text, what the driver says).
MUTANTS = {
    "storage offset not subtracted": (
        "ops/operands.cpp",
        "static_cast<const char*>(address)) - offset",
        "static_cast<const char*>(address))",
        "the storage offset was not subtracted",
    ),
    "wrong buffer index": ("metal/launch.cpp", BIND, BIND.replace(", index)", ", index ^ 1)"), "[unbound-buffer]"),
    "missing argument": ("metal/launch.cpp", BIND, f"if (index != 1) {BIND}", "[unbound-buffer]"),
    "short argument": (
        "metal/launch.cpp",
        "&params, sizeof params, kParams",
        "&params, 16, kParams",
        "[short-argument]",
    ),
    "wrong constant type": ("metal/library.cpp", "MTL::DataTypeBool", "MTL::DataTypeUChar", "is given as a uchar"),
    "oversize threadgroup memory": (
        "metal/launch.cpp",
        "encoder.dispatchThreadgroups(",
        "encoder.setThreadgroupMemoryLength(40000, 0);\n  encoder.dispatchThreadgroups(",
        "[threadgroup-memory]",
    ),
    "endEncoding on torch's encoder": (
        "metal/launch.cpp",
        "encoder.dispatchThreadgroups(size_of(launch.grid), size_of(launch.group));",
        "encoder.dispatchThreadgroups(size_of(launch.grid), size_of(launch.group));\n  encoder.endEncoding();",
        "[shared-encoder]",
    ),
    "commandEncoder() off the queue": (
        "metal/torch_queue.cpp",
        "const AOTITorchError failure =",
        "functions_.command_encoder(functions_.current_stream());\n  const AOTITorchError failure =",
        "[off-queue]",
    ),
    "leaked function": ("metal/library.cpp", TAKE, TAKE.replace("TransferPtr", "RetainPtr"), "MTLFunction #"),
    "over-released function": (
        "metal/library.cpp",
        "  return function;\n",
        "  function->release();\n  return function;\n",
        "release",
    ),
}


def run(name: str, patches: dict[str, tuple[str, str]], cache: Path) -> dict[str, object]:
    spec = find_spec("mfa._native")
    kernels = Path(spec.origin).with_name("libmfa_kernels_count.so") if spec and spec.origin else None
    if kernels is None or not kernels.exists():
        pytest.skip("libmfa_kernels_count.so is not built")
    library = build.ops(name, patches)
    environment = {**os.environ, "PYTHONPATH": str(build.HERE.parent), "MFA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "driver.backend_case", str(library), str(kernels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_backend_has_no_findings(tmp_path: Path) -> None:
    report = run("right", {}, tmp_path)
    assert report["error"] is None
    assert report["findings"] == []
    assert report["live"] == []
    assert report["difference"] < 1e-5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant: str, tmp_path: Path) -> None:
    file, old, new, text = MUTANTS[mutant]
    report = run(mutant.replace(" ", "_").replace("'", ""), {file: (old, new)}, tmp_path)
    assert text in str((report["error"], report["findings"], report["live"]))
