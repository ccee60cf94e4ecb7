"""The matrix unit's self-test: what decides whether M5 runs metal/unit/."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from plan_problems import METAL
from simulator_engine import build_kernels

import mfa
from mfa import _library, _log

pytestmark = pytest.mark.simulator


def kernel_run_with(unit_library: Path | None, directory: Path) -> str:
    """On an M5 with this library in the place of the package's own."""
    kernels = directory / "kernels.so"
    shutil.copy(_library.path_of("mfa_kernels_count"), kernels)
    if unit_library is not None:
        shutil.copy(unit_library, directory / "kernels_metal4.so")
    query, key, value = torch.randn(3, 1, 1, 100, 64, dtype=torch.float16)
    with mfa.simulate("apple10", kernel_library=kernels) as simulation:
        mfa.attention(query, key, value)
    return simulation.launches[0].kernel


def built(directory: Path, metal: Path = METAL, layout: int = 10) -> Path:
    sources = [metal / "unit" / "layout.metal"]
    return build_kernels(sources, directory / "layout.so", standard="metal4.0", unit_layout=layout)


@pytest.fixture(autouse=True)
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "said", set())


def test_it_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = _library.path_of("mfa_kernels_count_metal4")
    assert kernel_run_with(own, tmp_path) == "forward_f16_d64_v64_unit_s4_r2_k32"
    assert caplog.messages == []


def assert_falls_back(unit_library: Path | None, directory: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    with caplog.at_level(logging.WARNING, "mfa"):
        kernel = kernel_run_with(unit_library, directory)
    assert kernel == "forward_f16_d64_v64_staged_s8_r2_k32"
    (message,) = caplog.messages
    assert message.startswith("the matrix unit is not used: ")
    assert why in message


WRONG = "its data layout is not the one that the kernels are made for"


def test_another_layout_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That of the GPUs before M5."""
    assert_falls_back(built(tmp_path, layout=9), tmp_path, caplog, WRONG)


# Each takes one product's operands to be elsewhere.
MISTAKES = {
    "left": ("a[i] = left[i / 4][i % 4]", "a[i] = left[i % 2][i / 2 % 4]"),
    "right": ("b[i] = right[i / 4][i % 4]", "b[i] = right[(i / 4) ^ 2][i % 4]"),
    "right of 16 columns": (
        "b[i] = right[i / 4][i % 4]",
        "b[i] = right[kColumns == 16 ? (i / 4) ^ 2 : i / 4][i % 4]",
    ),
    "sum": ("last_rows[n][e] = sum[n / 2 * 8 + n % 2 * 2 + e + 4]", "last_rows[n][e] = sum[n / 2 * 8 + n % 2 * 2 + e]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_operand_is_looked_at(mistake: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metal = tmp_path / "metal"
    shutil.copytree(METAL, metal)
    text = (metal / "unit" / "product.h").read_text()
    right, wrong = MISTAKES[mistake]
    assert text.count(right) == 1
    (metal / "unit" / "product.h").write_text(text.replace(right, wrong))
    assert_falls_back(built(tmp_path, metal), tmp_path, caplog, WRONG)


def test_a_library_that_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_falls_back(None, tmp_path, caplog, "mfa_metal4.metallib can't be loaded: ")


def test_a_library_without_a_self_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "other.metal"
    layout = (METAL / "unit" / "layout.metal").read_text().replace("unit_layout(", "another(")
    source.write_text(re.sub(r'#include "(.*)"', rf'#include "{METAL}/unit/\1"', layout))
    library = build_kernels([source], tmp_path / "other.so", standard="metal4.0")
    assert_falls_back(library, tmp_path, caplog, "its library has no self-test: ")
