"""What a timing depends on and must be told with."""

import platform
import re
import subprocess
from typing import Any

import torch

from .. import device_info


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it doesn't exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: str) -> dict[str, Any]:
    """Chip, system, torch, power mode. No name of a user or a machine."""
    info = device_info()
    facts: dict[str, Any] = {
        "device": device,
        "gpu": info.name,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if platform.system() == "Darwin":
        cores = re.search(r'"gpu-core-count" = (\d+)', output_of("ioreg", "-rd1", "-c", "AGXAccelerator") or "")
        facts |= {
            "chip": output_of("sysctl", "-n", "machdep.cpu.brand_string"),
            "gpu_cores": int(cores[1]) if cores else None,
            "macos": output_of("sw_vers", "-productVersion"),
            "power": (output_of("pmset", "-g", "batt") or "").split("\n")[0],
            "low_power_mode": bool(re.search(r"lowpowermode\s+1", output_of("pmset", "-g") or "")),
        }
    return facts


def best_device() -> str:
    """mps where our kernels can run on it, or else cpu."""
    return "mps" if device_info().why_not is None else "cpu"
