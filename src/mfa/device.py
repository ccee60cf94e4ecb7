"""The GPU that the package would run on."""

from dataclasses import dataclass
from typing import Any

import torch

from . import _library


@dataclass(frozen=True)
class DeviceInfo:
    """The Apple GPU of this machine, and what mfa can do with it."""

    family: str | None  # apple7 (M1) ... apple10 (M5)
    name: str | None
    cores: int | None
    metallib: str | None  # path of the compiled kernels
    torch: str  # version
    why_not: str | None  # why `mps` tensors can't be used here; None if they can


def device_info() -> DeviceInfo:
    """What the machine has, and, where `mps` tensors can't be used, the reason."""
    from . import _native

    gpu: dict[str, Any] = dict(_native.device_info())
    metallib = _library.metallib() if _library.metallib().exists() else None
    why_not = gpu["why_not"]
    if why_not is None and metallib is None:
        why_not = f"the compiled kernels are missing: {_library.metallib()}"
    if why_not is None and not torch.backends.mps.is_available():
        why_not = "torch.backends.mps.is_available() is False"
    return DeviceInfo(
        family=gpu["family"],
        name=gpu["name"],
        cores=gpu["cores"],
        metallib=None if metallib is None else str(metallib),
        torch=torch.__version__,
        why_not=why_not,
    )


def is_available() -> bool:
    """Whether `mps` tensors can be used: an MPS device, and the compiled kernels for it."""
    return device_info().why_not is None
