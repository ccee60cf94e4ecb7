"""The command line: each command runs, and says what it should."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mfa import attention, demo, support
from mfa.__main__ import main


@pytest.mark.parametrize("command", ["", "info", "demo", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m mfa")


def test_info_has_reasons_and_the_support_table() -> None:
    command = [sys.executable, "-m", "mfa", "info"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    for fact in ("family", "metallib", "archive", "system", "torch", "mps tensors", "simulator"):
        assert f"\n{fact}" in "\n" + text
    assert support.markdown() in text


@pytest.mark.simulator
def test_demo_runs_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo"])
    text = capsys.readouterr().out
    assert text.count(" ok ") == text.count(" forward_") + text.count(" decode_") == len(demo.CASES)
    assert "WRONG" not in text


def test_demo_without_anything_to_run_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says on a Mac without a usable GPU."""
    monkeypatch.setattr(demo, "device_info", lambda: SimpleNamespace(why_not="a virtual one"))
    monkeypatch.setattr(demo.simulator, "why_not", lambda: "for Linux")
    main(["demo"])
    text = capsys.readouterr().out
    assert text.startswith("On the CPU. Nothing can run the kernels. GPU: a virtual one. Simulator: for Linux.\n")
    assert text.count(" ok ") == len(demo.CASES)


@pytest.mark.simulator
def test_demo_fails_when_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CASES", demo.CASES[:1])
    monkeypatch.setattr(demo, "attention", lambda *tensors, **terms: attention(*tensors, **terms) + 1)
    lines: list[str] = []
    with pytest.raises(SystemExit, match=r"^1$"):
        lines.extend(demo.table())
    assert any(" WRONG " in line for line in lines)


def test_bench_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "float32 dense", "--lengths", "64", "--seconds", "0.02", "--rounds", "1", "--csv"]
    main(["bench", "--cpu", *options])
    header, row = capsys.readouterr().out.splitlines()
    assert header == "case,torch_ms,mfa_ms,ratio,goal"
    assert row.startswith("float32 dense L=64,")


@pytest.mark.parametrize("arguments", ["nothing", "demo --fast", ""])
def test_unknown_commands_and_options_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments.split())
    assert "usage: python -m mfa" in capsys.readouterr().err


def test_importing_takes_little_beside_torch() -> None:
    """Of processor time, in one process: at most 15%."""
    code = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import mfa
print((time.process_time() - middle) / (middle - start))
"""
    assert (
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) <= 0.15
    )
