"""The one door between the ops and the simulator: who runs the calls of CPU tensors, if not the CPU kernels.

The ops ask here, and the simulator (simulator.py) enters itself here: neither needs to know the other.
"""

from typing import Any, Protocol

from torch import Tensor

from . import _library


class Device(Protocol):
    """What runs an op's kernel for MPS on CPU tensors."""

    def call(self, op: Any, *arguments: Any) -> Any:
        """What an MPS tensor would reach."""


_active: Device | None = None


def active() -> Device | None:
    """The device that CPU tensors run on now, if a simulation is active."""
    return _active


def runs_kernels(tensor: Tensor) -> bool:
    """Whether the Metal kernels run on such tensors now."""
    return tensor.device.type == "mps" or _active is not None


def set_active(device: Device | None) -> None:
    """Lets calls of CPU tensors run on `device`, in every thread; None ends that."""
    global _active
    _active = device


def why_not() -> str | None:
    """Why this build can't simulate, or None."""
    from . import _native

    if not hasattr(_native, "Simulator"):
        return "this build of mfa has no simulator, which is for Linux"
    for name in ("mfa_kernels_count", "mfa_kernels_fast"):
        if not _library.path_of(name).exists():
            return f"this build of mfa lacks {_library.path_of(name).name}, the kernels compiled for the simulator"
    return None
