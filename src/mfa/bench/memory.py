"""How much memory a call needs at a time, beyond what there was before it."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Of the tensors that the call makes. On mps it must be the first call: Metal's driver keeps what it once gave."""
    return _driver_growth(call) if device == "mps" else _peak_of_allocations(call)


def _driver_growth(call: Callable[[], object]) -> int:
    torch.mps.empty_cache()
    torch.mps.synchronize()
    before = torch.mps.driver_allocated_memory()
    call()
    torch.mps.synchronize()
    return torch.mps.driver_allocated_memory() - before


def _peak_of_allocations(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reads it when it first starts, and then is quiet
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    allocated = peak = 0
    for event in allocations:
        allocated += event["args"]["Bytes"]  # negative where memory is given back
        peak = max(peak, allocated)
    return peak
