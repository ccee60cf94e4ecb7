"""What `make mac` does on an M5, on the software driver: every line of it, but Apple's compiler and clock."""

import json
import os
import re
from pathlib import Path
from typing import Any

import mac_report
import pytest
from driver import process, xcrun

from mfa import _native

pytestmark = [pytest.mark.mps, pytest.mark.usefixtures("stand_in")]

# As much of MLX as the report calls.
MLX = """
import torch
from torch.nn.functional import scaled_dot_product_attention

float16, bfloat16 = torch.float16, torch.bfloat16

def eval(arrays):
    assert all(isinstance(array, torch.Tensor) for array in arrays)

class Array(torch.Tensor):
    def astype(self, dtype):
        return self.to(dtype)

class random:
    @staticmethod
    def normal(shape):
        return torch.randn(shape).as_subclass(Array)

class fast:
    @staticmethod
    def scaled_dot_product_attention(query, key, value, *, scale, mask=None):
        assert mask in (None, "causal")
        assert scale == query.shape[-1] ** -0.5
        return scaled_dot_product_attention(query, key, value, is_causal=mask is not None)
"""


@pytest.fixture(name="run")
def runner(tmp_path: Path) -> Any:
    """Results of parts, by name, with a compiler and MLX in place."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(MLX)

    def run(*parts: str) -> dict[str, Any]:
        paths = os.pathsep.join([str(process.TESTS), str(tmp_path)])
        text = process.run("mac_case", *parts, PATH=xcrun.install(tmp_path), PYTHONPATH=paths)
        results: dict[str, Any] = json.loads(text.splitlines()[-1])
        assert results.pop("findings") == []
        for name, result in results.items():
            if name.startswith("unit-"):
                assert set(result) == {"question", "measured", "answer"}
                assert mac_report.verdict(name, {"result": result}) == f"ok   {name}: {result['answer']}"
        return results

    return run


def test_probes(run: Any) -> None:
    parts = [f"unit-{name}" for name in ("layout", "adder", "overlap", "l1", "mlx")]
    found = {name: result["measured"] for name, result in run(*parts).items()}
    *products, impossible = found["unit-layout"].values()
    for product in products:
        assert product["as_expected"]
        assert product["sums_as_expected"]
    assert "one of m, n and k is 32" in impossible["error"]
    of_left = products[0]["places"][9].split(" ")[:8]
    assert of_left == ["12,0", "13,0", "14,0", "15,0", "12,8", "13,8", "14,8", "15,8"]
    assert found["unit-adder"]["adds_c_first"] == {"16x32x16": True, "16x16x32": True, "16x32x32": True}
    # Of a clock by which all launches take a millisecond.
    clocks = found["unit-adder"]["clocks_per_product"]["8"]
    assert clocks["chain_16x32x16_1"] == clocks["chain_16x16x32_1"] == 32
    assert clocks["chain_16x32x32_2"] == 8
    assert found["unit-overlap"]["8"] == dict.fromkeys(("products", "arithmetic", "together", "apart"), 1e-3)
    assert found["unit-l1"] == {region: {"8": 8 * 4096 / (2 * 32 * 8 / 4)} for region in ("4096", "8192")}
    assert len(found["unit-mlx"]) == 8
    assert all(each["ratio"] > 0 for each in found["unit-mlx"].values())


def test_kernels(run: Any) -> None:
    found = {name: result["measured"] for name, result in run("unit-spills", "unit-barrier").items()}
    threads, shares = found["unit-spills"]["most_threads"], found["unit-spills"]["share_of_peak"]
    forward = {each.name for each in _native.catalogue() if each.kind == "forward" and each.path.startswith("unit")}
    assert set(threads) == {name for name in forward if "_f16_" in name}
    assert set(threads.values()) == {1024}  # the device's limit, not the kernels' own
    assert [re.findall(r"_d(\d+)_", name)[0] for name in shares] == ["64", "80", "96", "128"]
    (variant,) = found["unit-barrier"].values()
    assert variant["times_as_fast"] == 1
    assert variant["largest_difference"] < 4e-3
