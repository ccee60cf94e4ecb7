"""The Linux wheel: built from the sources, looked into, installed in a clean environment, and run there.

MFA_WHEEL_TORCH lists the torch versions to install it with; without it, the one that is here.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from driver import build

ROOT = Path(__file__).resolve().parent.parent
TORCH = os.environ.get("MFA_WHEEL_TORCH", torch.__version__).split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("wheel"),
    pytest.mark.simulator,  # make mac-check looks into the macOS wheel
]

# With the simulator, without its sources.
FILES = {
    "mfa/__init__.py",
    "mfa/py.typed",
    "mfa/_native.abi3.so",
    "mfa/_native.pyi",
    "mfa/libmfa.so",
    "mfa/libmfa_driver.so",
    "mfa/libmfa_simulated.so",
    "mfa/libmfa_simulator.so",
    "mfa/libmfa_kernels_count.so",
    "mfa/libmfa_kernels_count_metal4.so",
    "mfa/libmfa_kernels_fast.so",
    "mfa/libmfa_kernels_fast_metal4.so",
    "mfa/mfa.metallib",
    "mfa/mfa_metal4.metallib",
}
RUNS = """
import mfa, torch
query, key, value = torch.randn(3, 1, 2, 40, 64).unbind()
query = query.requires_grad_()
with mfa.simulate(checks=("races", "bounds", "uninitialised")) as simulation:
    out = mfa.attention(query, key, value, is_causal=True)
    out.sum().backward()
exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
torch.testing.assert_close(out, exact)
assert len(simulation.launches) >= 3
print(mfa.__file__, torch.__version__)
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(name="wheel", scope="module")
def build_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", folder)
    with build.locked():  # in make's own build folder: little is compiled, by one process at a time
        run("nice", sys.executable, "-m", "pip", "wheel", *options, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_tags_and_files(wheel: Path) -> None:
    assert re.fullmatch(r"torch_mfa-[\w.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= FILES
    assert not [name for name in names if re.search(r"\.(h|hpp|cpp|metal|cmake|o|a)$|(^|/)tests/", name)]


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= 8e6


def test_libraries_are_found_beside_one_another(wheel: Path, tmp_path: Path) -> None:
    """No library looks into a folder of the machine that built it."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    for library in libraries:
        paths = re.findall(r"R(?:UN)?PATH\)\s+Library r(?:un)?path: \[(.*)\]", run("readelf", "-d", library))
        for path in ":".join(paths).split(":"):
            assert path in ("", "$ORIGIN", "$ORIGIN/../torch/lib"), f"{library}: {path}"


@pytest.mark.parametrize("version", TORCH)
def test_runs_in_a_clean_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    python = tmp_path / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    arguments = os.environ.get("MFA_WHEEL_TORCH_ARGS", "").split()
    run(*install, *arguments, f"torch=={version}")
    run(*install, wheel)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    location, found = run(python, "-c", RUNS, cwd=tmp_path, env=environment).split()
    assert Path(location).is_relative_to(tmp_path)
    assert found.split("+")[0] == version.split("+")[0]
    assert "simulator    yes" in run(python, "-m", "mfa", "info", cwd=tmp_path, env=environment)
