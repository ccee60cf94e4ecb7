"""cmake/metal_toolchain.sh and cmake/MetalLibrary.cmake, where Apple's Metal compiler is found in different ways.

xcrun and xcodebuild are stand-ins for Apple's, so that what only runs on a Mac has run here before.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CMAKE = Path(__file__).parent.parent / "cmake"
NAME = "com.apple.dt.toolchain.Metal.32023.883"
SDK = "26.2"
# MACHINE: `bundled` with Xcode; `component`, which xcrun finds once it is there; `named`, which only TOOLCHAINS finds.
XCRUN = f"""#!/bin/sh
[ "$1 $2" = "-sdk macosx" ] || exit 2
case $MACHINE in
    bundled) ;;
    component) [ -f downloaded ] ;;
    named) [ -f downloaded ] && [ "$TOOLCHAINS" = {NAME} ] ;;
    *) false ;;
esac || {{ echo "missing Metal Toolchain" >&2; exit 72; }}
[ "$3" = --show-sdk-version ] && echo "${{SDK:-{SDK}}}"
while [ $# -gt 0 ]; do
    case $1 in
        -o) echo "$*" > "$2" ;;
        -MF) echo "k.air: k.metal" > "$2" ;;
    esac
    shift
done
"""
XCODEBUILD = f"""#!/bin/sh
echo "$1" >> asked
case $1 in
    -showComponent) [ -f downloaded ] && echo "Status: installed" && echo "Toolchain Identifier: {NAME}" ;;
    -downloadComponent) [ "$MACHINE" != none ] && echo "Downloading" && touch downloaded ;;
esac
"""
PROJECT = """
cmake_minimum_required(VERSION 3.26)
project(p LANGUAGES NONE)
include("{cmake}/MetalLibrary.cmake")
add_metal_library(mfa STANDARD metal3.1 DEPLOYMENT_TARGET 14.0 SOURCES k.metal)
add_metal_library(mfa_metal4 STANDARD metal4.0 DEPLOYMENT_TARGET 26.2 LEAST_SDK 26.2 SOURCES k.metal)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has xcrun")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"xcrun": XCRUN, "xcodebuild": XCODEBUILD}.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(text)
        script.chmod(0o755)
    (tmp_path / "k.metal").touch()
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(cmake=CMAKE))
    return tmp_path


def run(folder: Path, machine: str, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "MACHINE": machine}
    environment.pop("TOOLCHAINS", None)
    words = list(map(str, command))
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("machine", "toolchains", "downloads"),
    [("bundled", "", False), ("component", "", True), ("named", f"{NAME}\n", True)],
)
def test_installs_once_and_names_what_xcrun_does_not_find(
    machine: str, toolchains: str, downloads: bool, folder: Path
) -> None:
    for _ in range(2):
        done = run(folder, machine, "sh", CMAKE / "metal_toolchain.sh", "--install")
        assert (done.returncode, done.stdout) == (0, toolchains)
    asked = folder / "asked"
    assert (asked.read_text() if asked.exists() else "").count("-downloadComponent") == downloads


@pytest.mark.parametrize(("machine", "options"), [("none", ["--install"]), ("none", []), ("component", [])])
def test_says_what_is_missing(machine: str, options: list[str], folder: Path) -> None:
    done = run(folder, machine, "sh", CMAKE / "metal_toolchain.sh", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-2].endswith("missing Metal Toolchain")
    assert done.stderr.endswith("run xcodebuild -downloadComponent MetalToolchain\n")
    assert not (folder / "downloaded").exists()


@pytest.fixture
def cmake() -> tuple[str, ...]:
    pytest.importorskip("cmake", reason="the package cmake isn't installed")
    return (sys.executable, "-m", "cmake")


@pytest.mark.parametrize("machine", ["bundled", "component", "named"])
def test_cmake_builds_a_metallib(machine: str, folder: Path, cmake: tuple[str, ...]) -> None:
    (folder / "downloaded").touch()
    for step in (["-S", ".", "-B", folder], ["--build", folder]):
        done = run(folder, machine, *cmake, *step)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "mfa.dir" / "k.air").read_text() == f"-o {folder}/mfa.dir/k.air\n"
    assert (folder / "mfa.metallib").exists()
    assert (folder / "mfa_metal4.metallib").exists()


@pytest.mark.parametrize("required", [True, False])
def test_cmake_skips_metal_4_with_an_older_sdk(
    required: bool, folder: Path, cmake: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDK", "26.1")
    done = run(folder, "bundled", *cmake, "-S", ".", "-B", folder, f"-DMFA_REQUIRE_METALLIB={required}")
    assert done.returncode == required
    message = " ".join(done.stderr.split())  # CMake breaks lines
    assert "No mfa_metal4.metallib: it needs the SDK of macOS 26.2, and this is that of 26.1." in message
    if not required:
        assert run(folder, "bundled", *cmake, "--build", folder).returncode == 0
        assert [library.name for library in folder.glob("*.metallib")] == ["mfa.metallib"]


@pytest.mark.parametrize("required", [True, False])
def test_cmake_without_a_compiler(required: bool, folder: Path, cmake: tuple[str, ...]) -> None:
    done = run(folder, "none", *cmake, "-S", ".", "-B", folder, f"-DMFA_REQUIRE_METALLIB={required}")
    assert done.returncode == required
    message = " ".join(done.stderr.split())  # CMake breaks lines
    assert "No metallib: kernels are compiled on first use. missing Metal Toolchain" in message
    assert "run xcodebuild -downloadComponent MetalToolchain" in message
