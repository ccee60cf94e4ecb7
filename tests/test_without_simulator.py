"""A build without the simulator, as every Mac's is: its tests pass, run as cibuildwheel runs them there.

No test here can see Apple's frameworks, but each sees what a Mac lacks.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_wheel import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.simulator, pytest.mark.xdist_group("wheel")]


@pytest.fixture(name="python", scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has such a build, and all else that is installed here."""
    folder = tmp_path_factory.mktemp("without_simulator")
    settings = ("cmake.define.MFA_SIMULATOR=OFF", f"build-dir={ROOT / 'build' / 'without-simulator'}")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", folder)
    run("nice", sys.executable, "-m", "pip", "wheel", *options, *(f"-C{setting}" for setting in settings), ROOT)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Python reads no .pth of a folder that a .pth names: what makes mfa editable there has no effect here.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_what_needs_no_gpu_passes(python: Path, tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    for source in config["test-sources"]:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PATH": f"{python.parent}:{environment['PATH']}",
        "MFA_CLANG": "/no/compiler/for/kernels",
        "PYTEST_ADDOPTS": "--junitxml=report.xml",
    }
    where = run("python", "-c", "import mfa; print(mfa.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    done = subprocess.run(
        ["nice", "sh", "-c", config["test-command"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    suite = ElementTree.parse(tmp_path / "report.xml").getroot().find("testsuite")
    assert suite is not None
    assert int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) > 1000
    reasons = {skipped.get("message") for skipped in suite.iter("skipped")}
    assert "this build of mfa has no simulator, which is for Linux" in reasons
