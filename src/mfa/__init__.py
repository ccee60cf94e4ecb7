"""Attention for PyTorch on Apple GPUs: exact, memory-efficient, from hand-written Metal kernels."""

from .attention import attention
from .device import DeviceInfo, device_info, is_available
from .simulator import Counters, Launch, Simulation, SimulationError, simulate

__all__ = [
    "Counters",
    "DeviceInfo",
    "Launch",
    "Simulation",
    "SimulationError",
    "attention",
    "device_info",
    "is_available",
    "simulate",
]
