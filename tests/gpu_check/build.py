"""Cases -> a directory with plans.json and one compiled file per pipeline.

Needs clang or ziglang, as the simulator does; with `ptxas` at hand it makes cubins, else PTX, which the driver compiles
when a pipeline is first used.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc/simulator/cuda"))
import translate_cuda  # noqa: E402
from translate_cuda import Pipeline, Source  # noqa: E402
from unit_products import PRODUCTS, source_of  # noqa: E402

from . import others, plans  # noqa: E402
from .cases import GROUPS, Case  # noqa: E402


def pipelines_of(entries: Iterable[dict[str, Any]]) -> set[Pipeline]:
    return {
        Pipeline(launch["kernel"], tuple(launch["constants"]), launch["group"][0])
        for entry in entries
        for plan in ("forward", "backward")
        for launch in entry.get(plan, {"launches": []})["launches"]
    }


def products_source(pipelines: Iterable[Pipeline], directory: Path) -> Iterator[Source]:
    """The products on the matrix unit that are among the pipelines, of a file that is written."""
    names = {pipeline.kernel for pipeline in pipelines}
    if products := [product for product in PRODUCTS if product.name in names]:
        file = directory / "products.metal"
        file.write_text(source_of(products))
        yield translate_cuda.translate_source(file, standard="metal4.0")


def assemble(ptx: str, output: Path, architecture: str) -> str:
    """Writes `output`.ptx, and `output`.cubin where there is ptxas: what that says of it. Does nothing twice."""
    source, binary, report = (Path(f"{output}.{suffix}") for suffix in ("ptx", "cubin", "txt"))
    ptxas = shutil.which("ptxas")
    if source.exists() and source.read_text() == ptx and (report.exists() or ptxas is None):
        return report.read_text() if report.exists() else ""
    for stale in (report, binary):
        stale.unlink(missing_ok=True)
    source.write_text(ptx)
    if ptxas is None:
        return ""
    command = [ptxas, f"-arch={architecture}", "-v", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report.write_text(done.stderr)
    return done.stderr


def resources(report: str) -> dict[str, int]:
    """Registers per thread, bytes of spills and of threadgroup memory, from what ptxas -v says."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
        "shared": r"(\d+) bytes smem",
    }
    return {name: int(found[1]) if (found := re.search(text, report)) else 0 for name, text in patterns.items()}


def compile_all(
    sources: Sequence[Source], pipelines: Iterable[Pipeline], directory: Path, architecture: str, *, tensor_core: bool
) -> dict[str, dict[str, int]]:
    """One file per pipeline; what each needs of the machine."""
    by_kernel = {kernel: source for source in sources for kernel in source.kernels}

    def build(pipeline: Pipeline) -> tuple[str, dict[str, int]]:
        source = by_kernel[pipeline.kernel]
        ptx = translate_cuda.compile_ptx(source, pipeline, tensor_core=tensor_core)
        return pipeline.name, resources(assemble(ptx, directory / pipeline.name, architecture))

    found: dict[str, dict[str, int]] = {}
    ordered = sorted(pipelines, key=lambda pipeline: pipeline.name)
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, needs in pool.map(build, ordered):
            found[name] = needs
            if len(found) % 20 == 0:
                sys.stdout.write(f"{len(found)} of {len(ordered)} pipelines, {time.monotonic() - start:.0f} s\n")
                sys.stdout.flush()
    return found


# Tiles that metal/instances.def has and tuning.def doesn't choose, beside the one that it does.
ALTERNATIVES = {
    "direct": "forward_f16_d{0}_v{0}_direct_s4_r{1}_k32",
    "four SIMD-groups": "forward_f16_d{0}_v{0}_staged_s4_r{1}_k32",
}


def counter_entries() -> list[dict[str, Any]]:
    """What counters.py runs: forward of ours on both paths, of MLX, of PyTorch; then our backward in both modes."""
    entries: list[dict[str, Any]] = []
    for dim, length, causal in product((64, 128), (2048, 8192), (False, True)):
        what = f"D{dim} N{length}{' causal' if causal else ''}"
        common = {"shape": (others.BATCH, others.HEADS, length, dim), "causal": causal}
        case = Case("", "f16", others.BATCH, others.HEADS, others.HEADS, length, length, dim)
        case = replace(case, window_right=0 if causal else None)
        entries.append({"name": f"forward {what}, mfa", "plans": [plans.plan(case)["forward"]], **common})
        for tile, name in ALTERNATIVES.items():
            found = plans.forward_by(name.format(dim, 2 if dim == 64 else 1), case)
            entries.append({"name": f"forward {what}, mfa {tile}", "plans": [found], **common})
        entries.append({"name": f"forward {what}, MLX", "launch": others.mlx_launch(dim, length, causal), **common})
        entries.append(
            {"name": f"forward {what}, PyTorch", "launch": others.torch_launch(dim, length, causal), **common}
        )
        for mode in ("seven_gemm", "five_gemm"):
            found = plans.plan(replace(case, backward=mode))
            both = [found["forward"], found["backward"]]
            entries.append({"name": f"backward {what}, {mode}", "plans": both, **common})
    return entries


def counter_pipelines(entries: Iterable[dict[str, Any]]) -> set[Pipeline]:
    launches = [entry["launch"] for entry in entries if "launch" in entry]
    launches += [launch for entry in entries for plan in entry.get("plans", []) for launch in plan["launches"]]
    return {Pipeline(launch["kernel"], tuple(launch["constants"]), launch["group"][0]) for launch in launches}


def build(directory: Path, groups: Sequence[str], architecture: str, *, counters: bool, tensor_core: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    entries = [plans.plan(case) for group in groups for case in GROUPS[group]()]
    sources = list(translate_cuda.translate_kernels(ROOT / "metal"))
    pipelines = pipelines_of(entries)
    counted = counter_entries() if counters else []
    with tempfile.TemporaryDirectory() as headers:
        sources += products_source(pipelines, Path(headers))
        if counters:
            sources += [others.mlx_source(Path(headers)), others.torch_source(Path(headers))]
            pipelines |= counter_pipelines(counted)
        needs = compile_all(sources, pipelines, directory, architecture, tensor_core=tensor_core)
    data = {"arguments": plans.enumerators("Argument"), "entries": entries, "counters": counted, "pipelines": needs}
    (directory / "plans.json").write_text(json.dumps(data))
