"""The GPU that the package would run on."""

from dataclasses import dataclass

import torch

from . import _metal


@dataclass(frozen=True)
class DeviceInfo:
    """The Apple GPU of this machine, and what mfa can do with it."""

    family: str | None  # apple7 (M1) ... apple10 (M5)
    name: str | None
    cores: int | None
    metallib: str | None  # the compiled kernels in use
    matrix_unit: str | None  # of M5: "used", or why not; None where nothing can be used
    uses_matrix_unit: bool
    torch: str  # version
    why_not: str | None  # why `mps` tensors can't be used here; None if they can


def device_info() -> DeviceInfo:
    """What the machine has, and, where `mps` tensors can't be used, the reasons.

    It is about the GPU of torch's tensors. A log message says so if that is not the system's default.
    """
    backend = _metal.info()
    has_mps = torch.backends.mps.is_available()
    reasons = ["this build of mfa has no Metal backend"] if backend is None else list(backend["why_not"])
    if not has_mps:
        reasons.append("torch finds no MPS device")
    gpu = backend or {}
    why_no_unit = gpu.get("why_no_unit")
    return DeviceInfo(
        family=gpu.get("family") or None,
        name=gpu.get("name") or None,
        cores=torch.backends.mps.get_core_count() if has_mps else None,
        metallib=gpu.get("metallib") or None,
        matrix_unit=None if why_no_unit is None else f"not used: {why_no_unit}" if why_no_unit else "used",
        uses_matrix_unit=why_no_unit == "",
        torch=torch.__version__,
        why_not="; ".join(reasons) or None,
    )


def is_available() -> bool:
    """Whether `mps` tensors can be used: an MPS device, and the compiled kernels for it."""
    return device_info().why_not is None
