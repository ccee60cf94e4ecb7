"""The benchmark submodule of mfa.mps_flash_attn."""

import json
from pathlib import Path

import pytest
import torch

from mfa.mps_flash_attn import benchmark


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "quick", "--seq-lengths", "32", "--dtypes", "fp32", "--backward"]
    report, numbers = tmp_path / "report.html", tmp_path / "results.json"
    benchmark.main([*arguments, "--output", str(report), "--json", str(numbers)])
    results = json.loads(numbers.read_text())
    assert len(results) == 4
    assert all(result["mfa_time_ms"] > 0 and result["speedup"] > 0 for result in results)
    assert report.read_text().count("<tr>") == 5
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "[4/4]" in printed


def test_benchmark_reports_errors() -> None:
    result = benchmark.run_benchmark(benchmark.BenchmarkConfig(seq_len=8, head_dim=1024, dtype="float32"))
    assert result.mfa_error is not None
    assert "head dimension 1024" in result.mfa_error
    assert result.sdpa_error is None
    windowed = benchmark.BenchmarkConfig(seq_len=8, dtype="float32", is_causal=True, window_size=4)
    assert benchmark.run_benchmark(windowed).sdpa_time_ms is None
    assert str(windowed) == "B=1 H=8 N=8 D=64 float32 causal window=4"
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        benchmark.get_dtype("int8")
