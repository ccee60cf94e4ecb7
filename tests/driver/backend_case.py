"""One process of test_backend_mutants.py: runs libmfa's forward op on the stand-in `mps` device, and reports as JSON.

python -m driver.backend_case LIBMFA KERNELS
"""

import ctypes
import json
import sys
from pathlib import Path

import torch

from . import build, control

CALLS = 3


def main(libmfa: Path, kernels: Path) -> None:
    driver = control.Driver(build.driver())
    driver.reset(kernels, mode="throw")
    ctypes.CDLL(str(build.mps_device()), mode=ctypes.RTLD_GLOBAL)
    torch._C._has_mps = True
    libmfa.with_name("mfa.metallib").write_text("mfa-simulator-metallib\n")
    torch.ops.load_library(libmfa)

    torch.manual_seed(0)
    report: dict[str, object] = {"error": None, "difference": None}
    # Slices: each begins at an offset in its storage. Different lengths: each makes a pipeline lookup of its own.
    storage = torch.randn(3, 2, 40, 64, device="mps")
    query, key, value = (storage[i : i + 1, :, 3:37] for i in range(3))
    try:
        differences = []
        for call in range(CALLS):
            length = 34 - call
            out, _ = torch.ops.mfa.attention_forward(
                query[:, :, :length], key, value, None, None, None, 0.125, None, None, 0.0, 0.0, None, None
            )
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, :length].cpu(), key.cpu(), value.cpu()
            )
            differences.append((out.cpu() - expected).abs().max().item())
        report["difference"] = max(differences)
    except RuntimeError as error:
        report["error"] = str(error)
    report["findings"] = driver.findings()
    report["live"] = [line for line in driver.live() if "MTLFunction " in line]
    sys.stdout.write(json.dumps(report))


main(Path(sys.argv[1]), Path(sys.argv[2]))
