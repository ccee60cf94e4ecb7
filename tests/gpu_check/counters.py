"""Launches for a profiler to count: our kernels, MLX's and PyTorch's on the same tensors, and each result is checked.

ncu --csv --page raw --clock-control none --metrics ... python -m gpu_check count | python -m gpu_check table
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .gpu import Gpu

METRICS = {
    "shared wavefronts, loads": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "shared wavefronts, stores": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
    "bank conflicts, loads": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "bank conflicts, stores": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "shared load instructions": "smsp__sass_inst_executed_op_shared_ld.sum",
    "global load instructions": "smsp__sass_inst_executed_op_global_ld.sum",
    "local load instructions": "smsp__sass_inst_executed_op_local_ld.sum",
    "L1 global load sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "L2 sectors": "lts__t_sectors.sum",
    "L2 sectors from L1": "lts__t_sectors_srcunit_tex.sum",
    "registers": "launch__registers_per_thread",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "time": "gpu__time_duration.sum",
}


def count(directory: Path) -> int:
    """Runs every launch once."""
    data = json.loads((directory / "plans.json").read_text())
    gpu = Gpu(directory, data["arguments"])
    failed = 0
    for entry in data["counters"]:
        batch, heads, length, dim = entry["shape"]
        generator = torch.Generator("cuda").manual_seed(0)
        query, key, value, grad = (
            torch.randn(batch, heads, length, dim, generator=generator, device="cuda").half() for _ in range(4)
        )
        rows = (batch, heads, length)
        tensors = {"query": query, "key": key, "value": value, "grad_out": grad, "out": torch.empty_like(query)}
        tensors["lse"] = torch.empty(rows, device="cuda")
        for name in ("grad_query", "grad_key", "grad_value", "correction"):
            tensors[name] = torch.empty_like(query)
        tensors["statistics"] = torch.empty(*rows, 2, device="cuda")
        if "launch" in entry:
            launch = entry["launch"]
            buffers = {
                int(index): tensors[what]
                if what in tensors
                else torch.frombuffer(bytearray.fromhex(what), dtype=torch.uint8).cuda()
                for index, what in launch["buffers"].items()
            }
            gpu.launch(launch["kernel"], launch["constants"], launch["grid"], launch["group"][0], buffers)
        for plan in entry.get("plans", []):
            gpu.run(plan, {name: x for name, x in tensors.items() if name in data["arguments"]})
        torch.cuda.synchronize()
        leaves = [x[-1:, -1:].float().requires_grad_() for x in (query, key, value)]
        expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=entry["causal"])
        wanted = {"out": expected}
        if len(entry.get("plans", [])) > 1:
            found = torch.autograd.grad(expected, leaves, grad[-1:, -1:].float())
            wanted |= dict(zip(("grad_query", "grad_key", "grad_value"), found, strict=True))
        error = max(float((tensors[name][-1:, -1:].float() - x).abs().max()) for name, x in wanted.items())
        failed += not error < 0.02
        sys.stderr.write(f"{entry['name']}: largest error {error:.1e}\n")
    return 1 if failed else 0


def metrics_that_exist(known: str) -> str:
    """For --metrics, of what `ncu --query-metrics` printed."""
    return ",".join(
        metric for metric in METRICS.values() if metric.startswith("launch__") or metric.split(".")[0] in known.split()
    )


def kernels_of(entry: dict[str, Any]) -> list[str]:
    if "launch" in entry:
        return [entry["launch"]["kernel"]]
    return [launch["kernel"] for plan in entry["plans"] for launch in plan["launches"]]


def table(directory: Path, profile: Path) -> str:
    """Markdown, of what ncu wrote: a line per launch."""
    lines = [line for line in profile.read_text().splitlines() if line.startswith('"')]
    header, _units, *rows = csv.reader(lines)
    entries = json.loads((directory / "plans.json").read_text())["counters"]
    launches = [(entry, kernel) for entry in entries for kernel in kernels_of(entry)]
    used = {label: header.index(metric) for label, metric in METRICS.items() if metric in header}
    text = [f"| what | kernel | {' | '.join(used)} |", "|---" * (2 + len(used)) + "|"]
    for (entry, kernel), row in zip(launches, rows, strict=True):
        if row[header.index("Kernel Name")] != kernel:
            raise ValueError(f"the profile has {row[header.index('Kernel Name')]} where {kernel} ran")
        text.append(f"| {entry['name']} | {kernel} | {' | '.join(row[at] for at in used.values())} |")
    return "\n".join([*text, ""])
