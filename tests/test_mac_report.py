"""tests/mac_report.py, which `make mac` runs: whom its report names, what it counts, what its runs share."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mac_report
import pytest

import mfa
from mfa import _native


def test_report_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "jäne"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "jäne")
    monkeypatch.setattr("platform.node", lambda: "Janes-Mac.local")
    metal = {"metallib": f"{home}/mfa.metallib", f"{home}/archive": ["/Volumes/jäne/x", {"log": "on Janes-Mac"}]}
    report = {"backend": {"result": {"metal": metal, "cores": 8, "notes": None}}}
    mac_report.write(report, tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    clean = {"metallib": "~/mfa.metallib", "~/archive": ["/Volumes/<user>/x", {"log": "on <host>"}]}
    assert written == {"backend": {"result": {"metal": clean, "cores": 8, "notes": None}}}


def test_report_is_written_without_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every part, whatever it says."""
    monkeypatch.setattr(mac_report, "PARTS", {"machine": None, "backend": None})
    monkeypatch.setattr(mac_report, "part", lambda name: {"result": {"mps": True, "path": f"{Path.home()}/{name}"}})
    monkeypatch.setattr(sys, "argv", ["mac", "--output", str(tmp_path / "report.json")])
    mac_report.main()
    written = json.loads((tmp_path / "report.json").read_text())
    assert [written[name]["result"]["path"] for name in ("machine", "backend")] == ["~/machine", "~/backend"]


def test_report_runs_tests_with_an_archive_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append(env)
        return subprocess.CompletedProcess(command, 1, "", "killed")

    monkeypatch.setenv("MFA_CACHE_DIR", "/the/users")
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert mac_report.pytest([], mac_report.SHADER_VALIDATION)["output"] == "killed"
    assert all(environment["MTL_SHADER_VALIDATION"] == "1" for environment in seen)
    assert len({environment["MFA_CACHE_DIR"] for environment in seen} - {"/the/users"}) == 2


def test_report_counts() -> None:
    crashed = {"error": "Traceback\nRuntimeError: no", "exit": 1}
    assert mac_report.verdict("benchmark", crashed) == "FAIL benchmark (exit 1): RuntimeError: no"
    counts = {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "exit": 1}
    assert mac_report.verdict("tests", {"result": counts}) == "FAIL tests: 3 tests, 1 failed, 1 skipped"


@pytest.mark.simulator
def test_report_has_every_forward_kernel_of_the_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac_report, "seconds", lambda function: function() is None or 1e-3)
    monkeypatch.setattr(mfa, "device_info", lambda: SimpleNamespace(family="apple10", cores=40))
    with mfa.simulate("apple10", checks=()) as sim:
        rows = mac_report.unit("cpu", length=32)
    assert rows
    names = [each.name for each in _native.catalogue() if each.kind == "forward" and each.path.startswith("unit")]
    assert [row["kernel"] for row in rows] == [launch.kernel for launch in sim.launches] == names
    assert all(row["predicted_issue"] > 0 and row["predicted_l1"] > 0 for row in rows)


def test_report_of_other_chips_has_no_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfa, "device_info", lambda: SimpleNamespace(family="apple9", cores=40))
    assert mac_report.unit() is None
    assert mac_report.PARTS["unit-layout"]() is None
