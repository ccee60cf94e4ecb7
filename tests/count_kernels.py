"""Counts what kernels do per step: `python tests/count_kernels.py` rewrites the cost model's src/mfa/bench/kernels.csv.

Our kernels and MLX's, alike: instructions and registers of data from optimised IR (csrc/simulator/instructions.py),
bytes from the simulator. Inputs are zeros, so that no maximum moves and every step is like the next.
"""

from __future__ import annotations

import csv
import re
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from agx_check.instances import family_of
from fidelity import TYPES, Problem
from simulator_engine import ROOT
from test_fidelity_mlx import build, steel_params, unpack

import mfa
from mfa import _library, _native
from mfa.bench.kernels import COUNTED as COLUMNS
from mfa.bench.kernels import PATH, Kernel

sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import instructions

TRUE = ["is_aligned", "is_exact_head", "writes_lse", "wants_grad_key", "wants_grad_value", "align_Q", "align_K"]
APART = {"dk": "wants_grad_value", "dv": "wants_grad_key"}  # variants of a kernel, and what they lack of TRUE
KINDS = ("forward", "decode", "backward_dkdv", "backward_dq", "backward_dq_from_ds")
LENGTHS = (128, 256)
DBIAS_HEADS = (1, 2)
FAMILIES = {"direct": "apple9", "unit": "apple10", "unit_team": "apple10"}  # that have a path
TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
COUNTED = (
    "mma",
    "mixed_mma",
    "wide_mma",
    "unit_mma",
    "arithmetic",
    "integer",
    "conversion",
    "move",
    "load",
    "store",
    "exp",
    "shuffle",
    "reduce",
)
# MLX 0.32.4's tiles, (rows, block, SIMD-groups over rows, over D), by D; and the factors by which bank conflicts slow
# its stores to threadgroup memory, from an address trace of K's transposed staging on 16 banks of 4 bytes.
STEEL = {64: (32, 32, 4, 1), 72: (32, 32, 4, 1), 80: (32, 32, 4, 1), 96: (32, 32, 4, 1), 128: (32, 16, 4, 1)}
STEEL[256] = (32, 16, 4, 2)
STEEL_DTYPES = {64: ("f16",), 72: ("bf16",), 80: ("f16",), 96: ("f16",), 128: ("f16", "bf16", "f32"), 256: ("f16",)}
NAX_DIMS = (64, 96, 128)
CONFLICTS = {64: 6.2, 72: 6.2, 80: 6.2, 96: 6.2, 128: 8.0, 256: 8.0}


def rows_of_instances() -> Iterator[tuple[str, _native.Instance, str]]:
    """A row of the two instances.def, the catalogue's, and a variant; those of kinds that the model knows."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "metal").rglob("instances.def")))
    catalogue = {instance.name: instance for instance in _native.catalogue()}
    for row in re.findall(r"^(?:FORWARD|DECODE|BACKWARD_D\w+)\(.*\)$", text, re.MULTILINE):
        name = host_name(row)
        instance = catalogue.get(name)
        if instance and (instance.kind in KINDS or (instance.kind, instance.path) == ("backward_dbias", "unit")):
            # dV and dK may come from two launches that differ. Of those in 8x8 matrices the model has none.
            pair = instance.head_dim + instance.value_dim
            apart = instance.kind == "backward_dkdv" and not instance.path.endswith("team") and pair > 128
            if apart and instance.path == "unit":
                yield from ((row, instance, variant) for variant in APART)
            elif not apart or pair <= 256:
                yield row, instance, ""


def host_name(row: str) -> str:
    macro, arguments = row.rstrip(")").split("(")
    words = arguments.split(", ")
    forms = {
        "FORWARD": "forward_{0}_d{3}_v{4}_{1}_s{5}_r{6}_k{7}",
        "DECODE": "decode_{0}_d{2}_v{3}_{1}_s{4}_r{5}_k{6}",
        "BACKWARD_DKDV": "backward_dkdv_{0}_d{2}_v{3}_{1}_s{4}_r{5}_q{6}",
        "BACKWARD_DQ": "backward_dq_{0}_d{3}_v{4}_{2}_{1}_s{5}_r{6}_k{7}",
        "BACKWARD_DBIAS": "backward_dbias_{0}_d{2}_v{3}_{1}_s{4}_k{5}",
        "BACKWARD_DQ_FROM_DS": "backward_dq_from_ds_{0}_d{1}_s{2}_q{3}_k{4}",
    }
    name = forms[macro].format(*words) if macro in forms else ""
    return name.replace("_staged", "") if macro.startswith("BACKWARD") else name


def bytes_of_ours(instance: _native.Instance, variant: str) -> list[dict[str, int]]:
    """Counters of the kernel's launches at LENGTHS; of dBias for so many heads."""
    before = _library.set_backward_mode(5 if instance.kind == "backward_dq_from_ds" else 7)
    _library.prefer_instance(instance.name)
    try:
        if instance.kind == "backward_dbias":
            return [dbias_counters(instance, heads) for heads in DBIAS_HEADS]
        return [launch_counters(instance, variant, length) for length in LENGTHS]
    finally:
        _library.set_backward_mode(before)
        _library.prefer_instance(None)


def launch_counters(instance: _native.Instance, variant: str, length: int) -> dict[str, int]:
    if instance.kind == "decode":
        return decode_counters(instance, length)
    query, key, value = (
        torch.zeros(1, 1, length, dim, dtype=TORCH_DTYPES[instance.dtype], requires_grad=instance.kind != "forward")
        for dim in (instance.head_dim, instance.head_dim, instance.value_dim or instance.head_dim)
    )
    # Else all P were the same, and the unit refines those.
    if instance.path.startswith("unit") and instance.kind != "forward":
        generator = torch.Generator().manual_seed(0)
        query, key = ((0.1 * torch.randn(x.shape, generator=generator)).to(x).requires_grad_() for x in (query, key))
    with mfa.simulate(FAMILIES.get(instance.path, "apple7")) as sim:
        out = mfa.attention(query, key, value)
        if instance.kind != "forward":
            torch.autograd.grad(out, (query, key, value), torch.zeros_like(out))
    found = [launch for launch in sim.launches if launch.kernel == instance.name]
    if variant:
        found = [launch for launch in found if not launch.constants[APART[variant]]]
    assert found, f"{instance.name} didn't run, but {[launch.kernel for launch in sim.launches]}"
    total = sum((launch.counters for launch in found), mfa.Counters())
    return vars(total)


def dbias_counters(instance: _native.Instance, heads: int) -> dict[str, int]:
    """Of a bias that all heads have; a threadgroup has a tile of it, and a step for each head."""
    shapes = [(1, heads, LENGTHS[0], dim) for dim in (instance.head_dim, instance.head_dim, instance.value_dim)]
    query, key, value = (torch.zeros(shape, dtype=TORCH_DTYPES[instance.dtype]) for shape in shapes)
    bias = torch.zeros(LENGTHS[0], LENGTHS[0], dtype=query.dtype, requires_grad=True)
    with mfa.simulate(FAMILIES[instance.path]) as sim:
        out = mfa.attention(query, key, value, attn_mask=bias)
        torch.autograd.grad(out, bias, torch.zeros_like(out))
    (counters,) = (launch.counters for launch in sim.launches if launch.kernel == instance.name)
    return vars(counters)


def is_of_latents(instance: _native.Instance) -> bool:
    """MLA decodes with it: its values are columns of its keys."""
    return instance.kind == "decode" and instance.head_dim == 576


def decode_counters(instance: _native.Instance, length: int) -> dict[str, int]:
    """One token of as many heads as the kernel has rows, over `length` keys of one head, not split."""
    dtype = TORCH_DTYPES[instance.dtype]
    query = torch.zeros(1, instance.rows, 1, instance.head_dim, dtype=dtype)
    key, value = (torch.zeros(1, 1, length, dim, dtype=dtype) for dim in (instance.head_dim, instance.value_dim))
    if is_of_latents(instance):
        value = key[..., : instance.value_dim]
    with mfa.simulate(FAMILIES.get(instance.path, "apple7")) as sim:
        mfa.attention_with_kv_cache(query, key, value, cache_seqlens=length, num_splits=1)
    (launch,) = sim.launches
    assert launch.kernel == instance.name
    return vars(launch.counters)


def kernel_of(
    name: str,
    kind: str,
    dtype: str,
    dim: int,
    path: str,
    tile: tuple[int, int, int],
    memory: int,
    ir: str,
    counters: list[dict[str, int]],
    conflict: float = 1.0,
) -> Kernel:
    rows, block, simdgroups = tile
    step = instructions.step_of(instructions.kernel_of(ir))
    # A ballot, one instruction to Mesa's backend as a shuffle is; what it costs nobody says.
    step.counts["shuffle"] += step.counts["vote"]
    groups = [1 if kind == "decode" else length // rows for length in LENGTHS]
    steps = [length // block for length in LENGTHS]
    if kind == "backward_dbias":
        groups, steps = [groups[0] * steps[0]] * 2, list(DBIAS_HEADS)

    def line(counter: str) -> tuple[int, int]:
        """(per step of a threadgroup, per threadgroup)"""
        first, second = (c[counter] / g for c, g in zip(counters, groups, strict=True))
        slope = (second - first) / (steps[1] - steps[0])
        assert slope == int(slope), (name, counter, slope)
        return int(slope), round(first - slope * steps[0])

    products = sum(step.counts.get(kind, 0) for kind in instructions.PRODUCTS)
    counter = "unit_mma" if "unit_mma" in step.counts else "mma"
    assert line(counter)[0] == products * simdgroups, (name, line(counter), products)
    device_read, device_write = line("device_read_bytes"), line("device_write_bytes")
    return Kernel(
        name=name,
        kind=kind,
        dtype=dtype,
        head_dim=dim,
        path=path,
        simdgroups=simdgroups,
        rows=rows,
        block=block,
        threadgroup_memory=memory,
        data_registers=step.registers,
        exceptions=step.exceptions,
        **{kind: step.counts.get(kind, 0) for kind in COUNTED},
        barrier=line("threadgroup_barriers")[0] // simdgroups,
        fence=line("simdgroup_barriers")[0] // simdgroups,
        threadgroup_read=line("threadgroup_read_bytes")[0],
        threadgroup_write=line("threadgroup_write_bytes")[0],
        device_read=device_read[0],
        device_write=device_write[0],
        tile_device_read=device_read[1],
        tile_device_write=device_write[1],
        store_conflict=conflict,
    )


def ours() -> Iterator[Kernel]:
    for row, instance, variant in rows_of_instances():
        source = f'#include "{family_of(instance)}.h"\nnamespace mfa {{\n{row}\n}}\n'
        standard = "metal4.0" if FAMILIES.get(instance.path) == "apple10" else "metal3.1"
        true = [name for name in TRUE if name != APART.get(variant)]
        true += ["value_is_key"] if is_of_latents(instance) else []
        true += ["has_bias"] if instance.kind == "backward_dbias" else []
        ir = instructions.emit(source, [ROOT / "metal"], true, standard=standard)
        yield kernel_of(
            f"{instance.name}/{variant}" if variant else instance.name,
            instance.kind,
            instance.dtype,
            instance.head_dim,
            instance.path,
            (instance.rows, instance.block, instance.simdgroups),
            instance.threadgroup_memory,
            ir,
            bytes_of_ours(instance, variant),
        )


def mlx(directory: Path) -> Iterator[Kernel]:
    """MLX's kernels, with headers unpacked into `directory`: those for M1 to M4, and those for the matrix unit."""
    includes = unpack(directory)
    for dim, dtypes in STEEL_DTYPES.items():
        rows, block, over_rows, over_dim = STEEL[dim]
        for dtype in dtypes:
            name = f"steel_{dtype}_d{dim}"
            instance = (
                f'instantiate_kernel("{name}", attention, {TYPES[dtype][0]}, {rows}, {block}, {dim}, {dim}, '
                f"{over_rows}, {over_dim}, float, float)"
            )
            yield steel(includes, name, "steel_attention", instance, dtype, dim, STEEL[dim])
    # Unrolled wholly: a loop in the main loop would be taken for it.
    header = includes[1] / "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention_nax.h"
    header.write_text(header.read_text().replace("unroll_count(4)", "unroll(full)"))
    for dim, dtype in product(NAX_DIMS, ("f16", "bf16")):
        name, scalar = f"steel_nax_{dtype}_d{dim}", TYPES[dtype][0]
        instance = f'instantiate_kernel("{name}", attention_nax, {scalar}, 64, 32, {dim}, {dim}, 4, 1, {scalar}, float)'
        yield steel(includes, name, "steel_attention_nax", instance, dtype, dim, (64, 32, 4, 1), "metal4.0")


def steel(
    includes: list[Path],
    name: str,
    header: str,
    instance: str,
    dtype: str,
    dim: int,
    tile: tuple[int, int, int, int],
    standard: str = "metal3.1",
) -> Kernel:
    rows, block, over_rows, over_dim = tile
    library = build(includes, name, "count", f"steel/attn/kernels/{header}.h", [instance], standard)
    source = (includes[0].parent / f"{name}.metal").read_text()
    ir = instructions.emit(source, includes, TRUE, standard=standard)
    counters, memory = [], 0
    for length in LENGTHS:
        problem = Problem(dtype, dim, length, length)
        q, k, v = (np.zeros_like(x) for x in problem.tensors())
        out, lse = np.zeros_like(q), np.zeros(q.shape[:3], np.float32)
        constants = dict.fromkeys(["has_mask", "do_causal", "has_sinks"], False)
        arguments = dict(enumerate([q, k, v, out, steel_params(problem, [q, k, v, out], (rows, block))]))
        counters.append(
            library.dispatch(
                name,
                grid=(length // rows, 1, 1),
                group=(32, over_rows, over_dim),
                arguments={**arguments, 8: lse},
                constants=constants | dict.fromkeys(["align_Q", "align_K", "save_lse"], True),
                checks=0,
            )
        )
        memory = library.threadgroup_memory_used
    return kernel_of(
        name,
        "forward",
        dtype,
        dim,
        "unit" if standard == "metal4.0" else "staged",
        (rows, block, over_rows * over_dim),
        memory,
        ir,
        counters,
        CONFLICTS[dim] if standard == "metal3.1" else 1.0,
    )


def count() -> list[Kernel]:
    with tempfile.TemporaryDirectory() as directory:
        return [*ours(), *mlx(Path(directory))]


def write(kernels: list[Kernel]) -> None:
    with PATH.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(kernel[: len(COLUMNS)] for kernel in kernels)


if __name__ == "__main__":
    write(count())
