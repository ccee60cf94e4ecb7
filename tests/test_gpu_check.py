"""make gpu-check without a GPU: its plans, reference and verdicts on the simulator, and that kernels compile to PTX."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator_engine import Library, build_kernels, open_library
from torch import Tensor
from unit_products import PRODUCTS, source_of

from mfa import _library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc/simulator/cuda"))

from gpu_check import plans  # noqa: E402
from gpu_check.cases import GROUPS, Case  # noqa: E402
from gpu_check.check import Problem, check, check_unit_product, verdict  # noqa: E402
from translate_cuda import Pipeline, compile_ptx, translate_source  # noqa: E402

pytestmark = pytest.mark.simulator

SMALL = [
    case for group in ("small", "unit") for case in GROUPS[group]() if case.head_dim == 64 and not case.unit_product
]


class Simulated:
    """What gpu_check.gpu.Gpu is, on the simulator."""

    device = "cpu"

    def __init__(self) -> None:
        self.libraries = [Library(_library.path_of(name)) for name in ("mfa_kernels_fast", "mfa_kernels_fast_metal4")]
        self.arguments = plans.enumerators("Argument")

    def run(self, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        made = {"params": torch.frombuffer(bytearray.fromhex(plan["params"]), dtype=torch.uint8)}
        for name, size in (("score_gradient", "scratch"), ("tile_map", "tile_map"), ("mask_classes", "mask_class")):
            made[name] = torch.full((plan[f"{size}_bytes"],), 255, dtype=torch.uint8)
        for launch in plan["launches"]:
            made["first_unit"] = torch.tensor(launch["unit"], dtype=torch.int32)
            arguments = {
                self.arguments[name]: torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
                for name, tensor in {**tensors, **made}.items()
            }
            constants = {index: index in launch["constants"] for index in plans.CONSTANTS.values()}
            self.libraries["_unit_" in launch["kernel"]].dispatch(
                launch["kernel"],
                grid=launch["grid"],
                group=launch["group"],
                arguments=arguments,
                constants=constants,
                checks=0,
            )


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_cases_pass_on_the_simulator(case: Case) -> None:
    found = verdict(Problem(Simulated(), plans.plan(case)))
    assert found["passes"], found


def test_cases_of_the_unit_are_planned_for_it() -> None:
    for case in [*GROUPS["unit"](), *GROUPS["unit_full"]()]:
        if not case.unit_product and not case.value_dim:
            found = plans.plan(case)
            kernels = [
                launch["kernel"]
                for part in ("forward", "backward")
                for launch in found.get(part, {"launches": []})["launches"]
            ]
            heavy = [
                name
                for name in kernels
                if name.startswith(("forward_", "decode_", "backward_d")) and "_delta_" not in name
            ]
            assert all("_unit_" in name for name in heavy if "_dslopes_" not in name), case.name


class Products:
    """What makes a product on the GPU, in the simulator."""

    device = "cpu"

    def __init__(self, directory: Path) -> None:
        source = directory / "products.metal"
        source.write_text(source_of(PRODUCTS))
        self.library = open_library(
            build_kernels([source], source.with_suffix(".so"), standard="metal4.0", mode="fast")
        )

    def launch(
        self, kernel: str, constants: list[int], grid: tuple[int, ...], threads: int, buffers: Mapping[int, Tensor]
    ) -> None:
        arguments = {index: tensor.numpy() for index, tensor in buffers.items()}
        self.library.dispatch(kernel, grid=grid, group=(threads,), arguments=arguments, checks=0)


def test_products_are_checked_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Products(tmp_path)
    entries = [plans.plan(case) for case in GROUPS["unit"]() if case.unit_product]
    assert all(check_unit_product(gpu, entry)["passes"] for entry in entries)
    launch = Products.launch

    def spoiled(self: Products, *arguments: Any) -> None:
        launch(self, *arguments)
        arguments[-1][2].view(torch.uint8)[-1, -1] ^= 1

    monkeypatch.setattr(Products, "launch", spoiled)
    assert not any(check_unit_product(gpu, entry)["passes"] for entry in entries)


@pytest.mark.parametrize("name", ["out", "lse", "grad_query", "grad_key", "grad_value"])
def test_a_wrong_result_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Simulated(), plans.plan(SMALL[0]))
    run = Problem.run

    def spoiled(self: Problem) -> dict[str, Tensor]:
        results = run(self)
        results[name].flatten()[-1] += 0.02
        return results

    monkeypatch.setattr(Problem, "run", spoiled)
    found = check(problem)
    assert [each for each, ratio in found["of_bound"].items() if ratio > 1] == [name]


@pytest.mark.parametrize("name", ["out", "key", "value_scale", "new_lengths"])
def test_a_wrong_bit_of_a_cache_is_found(name: str) -> None:
    class Spoiled(Simulated):
        def run(self, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
            super().run(plan, tensors)
            tensors[name].view(torch.uint8).view(-1)[-1] ^= 1

    case = next(case for case in SMALL if case.new_tokens and case.rotary and case.cache == "int8")
    assert verdict(Problem(Spoiled(), plans.plan(case)))["differing"] == [name]


@pytest.mark.parametrize(
    ("file", "kernel"),
    [
        ("append_bf16", ""),
        ("forward_f16", "forward_f16_d64_v64_staged_s4_r2_k32"),
        ("tile_map", ""),
        ("unit/forward_bf16", "forward_bf16_d64_v64_unit_s4_r2_k32"),
    ],
)
def test_kernels_compile_to_ptx(file: str, kernel: str) -> None:
    standard = "metal4.0" if file.startswith("unit/") else "metal3.1"
    source = translate_source(ROOT / f"metal/{file}.metal", include_dirs=[ROOT / "metal"], standard=standard)
    kernel = kernel or min(source.kernels)
    ptx = compile_ptx(source, Pipeline(kernel, (2, 3), 128))
    assert f".entry {kernel}(" in ptx
    assert ".maxntid 128, 1, 1" in ptx
    assert "call" not in ptx.replace("_call", "")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_tensor_core_is_a_choice(dtype: str) -> None:
    source = translate_source(ROOT / f"metal/forward_{dtype}.metal", include_dirs=[ROOT / "metal"])
    pipeline = Pipeline(min(kernel for kernel in source.kernels if "_d64_v64_staged_" in kernel), (), 128)
    instruction = f"mma.sync.aligned.m16n8k8.row.col.f32.{dtype}.{dtype}.f32"
    assert instruction in compile_ptx(source, pipeline)
    assert "mma.sync" not in compile_ptx(source, pipeline, tensor_core=False)
