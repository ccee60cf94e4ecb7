"""The simulator's matrix unit (M5): its layout and its arithmetic against numpy, and what it stops on."""
# ruff: noqa: E501

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from simulator_engine import BOUNDS, RACES, Library, SimulationError, build_kernels, open_library
from unit_products import M5, OLDER, PRODUCTS, Product, places, source_of

pytestmark = pytest.mark.simulator

SHUFFLES = Path(__file__).parents[1] / "csrc/simulator/cuda/unit_product.h"


def by_shuffles(text: str) -> str:
    """The kernels with the product as an NVIDIA GPU makes it."""
    header = re.sub(r"^#(include|pragma once).*", "", SHUFFLES.read_text(), flags=re.MULTILINE)
    types = "kM, kN, kK, kLeft, kRight, kAccumulates, A, B, D"
    call = f"sum.elements = ::mfa_sim::Shuffled<{types}>::run(left.elements, right.elements, sum.elements, nullptr, 0);"
    return header.replace("UnitProduct", "Shuffled") + text.replace("op.run(left, right, sum);", call)


@pytest.fixture(scope="session", params=["m5", "older", "shuffles"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, int]:
    source = tmp_path_factory.mktemp("unit") / "products.metal"
    text = source_of(PRODUCTS)
    source.write_text(by_shuffles(text) if request.param == "shuffles" else text)
    layout = OLDER if request.param == "older" else M5
    options = {"standard": "metal4.0", "unit_layout": layout}
    return open_library(build_kernels([source], source.with_suffix(".so"), **options)), layout


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_product(library: tuple[Library, int], product: Product, seed: int) -> None:
    """Bit for bit, wherever the layout puts the elements."""
    a, b, d, expected = product.problem(seed)
    got_places = np.full((32, (a.size + b.size + d.size) // 32, 2), -1, np.int32)
    counters = library[0].dispatch(
        product.name, grid=(1,), group=(32,), arguments=[a, b, d, got_places], checks=RACES | BOUNDS, seed=seed
    )
    np.testing.assert_array_equal(d, expected)
    np.testing.assert_array_equal(got_places, places(library[1], product))
    by_shuffles = counters["shuffles"] > 0
    assert (counters["unit_mma"], counters["mma"]) == (0 if by_shuffles else math.prod(product.shape) // 4096, 0)


def test_operands_of_float_lose_13_bits(library: tuple[Library, int]) -> None:
    """Towards zero, however small what is left over: 1 + 2^-11 is 1."""
    a, b = np.zeros((16, 16), np.float32), np.eye(16, 32, dtype=np.float16)
    a[:, 0], a[:, 1] = 1 + 2**-11, -(1 + 2**-10 + 2**-11 + 2**-23)
    d = np.zeros((16, 32), np.float32)
    arguments = [a, b, d, np.zeros((32, 40, 2), np.int32)]
    library[0].dispatch("f32_f16_f32_16x32x16_001", grid=(1,), group=(32,), arguments=arguments)
    np.testing.assert_array_equal(d[:, :3], np.tile([1, -(1 + 2**-10), 0], (16, 1)))


SETUP = """  constexpr auto descriptor = matmul2d_descriptor(16, 32, 16, false, false, true, matmul2d_descriptor::mode::{mode});
  matmul2d<descriptor, execution_simdgroup> op;
  auto left = op.get_left_input_cooperative_tensor<half, half, float>();
  auto right = op.get_right_input_cooperative_tensor<half, half, float>();
  auto sum = op.get_destination_cooperative_tensor<decltype(left), decltype(right), float>();
  for (int i = 0; i < 8; ++i) {{ left[i] = 1; }}
  for (int i = 0; i < 16; ++i) {{ right[i] = 1; sum[i] = 0; }}
"""


@dataclass(frozen=True)
class Verdict:
    """Statements after SETUP or, with `old`, in place of a part of it; `message` is what the engine says, empty: nothing."""

    name: str
    code: str
    message: str = ""
    old: str = ""
    mode: str = "multiply_accumulate"

    @property
    def kernel(self) -> str:
        setup = SETUP.format(mode=self.mode)
        assert self.old in setup
        body = setup.replace(self.old, "") if self.old else setup
        parameters = "device float* y, uint lane [[thread_index_in_simdgroup]]"
        return f"kernel void {self.name}({parameters}) {{\n{body}{self.code}\n}}\n"


RUN = "op.run(left, right, sum); y[lane] = sum[3];"
VERDICTS = [
    Verdict("whole", RUN),
    Verdict("in_half_of_the_lanes", "if (lane < 16) {\nop.run(left, right, sum);\n}\ny[lane] = simd_sum(sum[3]);", "divergent"),
    Verdict("at_two_sites", "if (lane == 7) {\nop.run(left, right, sum);\n} else {\nop.run(left, right, sum);\n}\ny[lane] = sum[3];", "divergent"),
    Verdict("after_a_return", "if (lane == 3) { return; }\n" + RUN, "lanes missing|returned"),
    Verdict("element_beyond_the_end", "left[lane < 31 ? 0 : 8] = 1;\n" + RUN, "element of a cooperative tensor out of bounds"),
    Verdict("element_before_the_begin", "y[lane] = sum[int(lane) - 1];", "element of a cooperative tensor out of bounds"),
    Verdict("left_unwritten", RUN, "uninitialised element of its left operand", "left[i] = 1;"),
    Verdict("right_unwritten", RUN, "uninitialised element of its right operand", "right[i] = 1;"),
    Verdict("sum_unwritten", RUN, "uninitialised element of its destination", "sum[i] = 0;"),
    Verdict("one_lane_unwritten", "if (lane != 9) { for (int i = 0; i < 8; ++i) { left[i] = 2; } }\n" + RUN,
            "uninitialised element of its left operand", "left[i] = 1;"),
    Verdict("sum_overwritten", RUN, "", "sum[i] = 0;", "multiply"),
    Verdict("from_unwritten_memory", "threadgroup half t[32]; left[2] = t[lane];\n" + RUN, "uninitialised element of its left operand"),
]  # fmt: skip
READ = Verdict("read_unwritten", "y[lane] = sum[3];", old="sum[i] = 0;")


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Library:
    source = tmp_path_factory.mktemp("unit_verdicts") / "unit_verdicts.metal"
    begin = re.split("#define", Path(__file__).with_name("simulator_unit.metal").read_text())[0]
    source.write_text(begin + "".join(verdict.kernel for verdict in [*VERDICTS, READ]))
    return open_library(build_kernels([source], source.with_suffix(".so"), standard="metal4.0"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("verdict", VERDICTS, ids=lambda verdict: verdict.name)
def test_verdict(verdicts: Library, verdict: Verdict, seed: int) -> None:
    y = np.zeros(32, np.float32)
    if not verdict.message:
        verdicts.dispatch(verdict.name, grid=(1,), group=(32,), arguments=[y], seed=seed)
        np.testing.assert_array_equal(y, 16)
        return
    with pytest.raises(SimulationError, match=rf"(?s)kernel '{verdict.name}'.*({verdict.message})") as caught:
        verdicts.dispatch(verdict.name, grid=(1,), group=(32,), arguments=[y], seed=seed)
    assert "unit_verdicts.metal:" in str(caught.value)


def test_an_unwritten_element_reads_as_nan(verdicts: Library) -> None:
    y = np.zeros(32, np.float32)
    verdicts.dispatch("read_unwritten", grid=(1,), group=(32,), arguments=[y])
    assert np.isnan(y).all()
