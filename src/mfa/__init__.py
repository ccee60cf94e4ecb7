"""Attention for PyTorch on Apple GPUs: exact, memory-efficient, from hand-written Metal kernels."""

from . import masks
from .attention import attention
from .block_mask import PackedBlockMask, pack_block_mask
from .checkpointing import ops_to_save
from .context_parallel import context_parallel
from .device import DeviceInfo, device_info, is_available
from .flex import flex_attention
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
    "PackedBlockMask",
    "Simulation",
    "SimulationError",
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "clear_cache",
    "context_parallel",
    "device_info",
    "flex_attention",
    "is_available",
    "masks",
    "merge_attention",
    "ops_to_save",
    "pack_block_mask",
    "precompile",
    "quantize_kv",
    "simulate",
]
