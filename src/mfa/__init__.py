"""Attention for PyTorch on Apple GPUs: exact, memory-efficient, from hand-written Metal kernels."""

from . import masks
from .attention import attention
from .checkpointing import ops_to_save
from .context_parallel import context_parallel
from .device import DeviceInfo, device_info, is_available
from .kv_cache import attention_with_kv_cache
from .merge import merge_attention
from .pipelines import clear_cache, precompile
from .quantize import quantize_kv
from .simulator import Counters, Launch, Simulation, SimulationError, simulate
from .varlen import attention_varlen

__all__ = [
    "Counters",
    "DeviceInfo",
    "Launch",
    "Simulation",
    "SimulationError",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "clear_cache",
    "context_parallel",
    "device_info",
    "is_available",
    "masks",
    "merge_attention",
    "ops_to_save",
    "precompile",
    "quantize_kv",
    "simulate",
]
