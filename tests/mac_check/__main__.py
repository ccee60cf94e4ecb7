"""make mac-check: the macOS wheel, cross-built on Linux and linked strictly against real torch libraries of macOS.

It proves that every source compiles with Apple's own metal-cpp declarations for arm64, that every symbol exists under
that mangling in every torch release, and what the binaries import, export and ask of the loader. It cannot prove
selectors, kernel arguments or numerics, nor that Apple's Metal compiler takes the kernels. Never ship what it builds.
"""

import argparse
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import macos_wheel

from . import binary, inputs, sdk, wheel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONTROL = """#include <cstdint>
extern "C" {{
{declarations}
__attribute__((visibility("default"))) std::uintptr_t control() {{ return {uses}; }}
}}
"""


def release_environment() -> dict[str, str]:
    """What cibuildwheel builds the wheel with: its default for arm64, and what pyproject.toml says."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    stated = tool["cibuildwheel"]["macos"]["environment"]
    # Constraints are for an isolated build, which this isn't.
    return {"_PYTHON_HOST_PLATFORM": "macosx-11.0-arm64", **stated, "PIP_CONSTRAINT": os.devnull}


class Check:
    def __init__(self, cache: Path, versions: list[str], newest: bool) -> None:
        self.cache, self.versions, self.newest = cache, versions, newest
        self.sdk = cache / "sdk"
        self.build = cache / "build"
        self.compiler = cache / "tools" / "mac-c++"
        self.failed = False

    def step(self, title: str, work: Callable[[], list[str]]) -> None:
        start = time.monotonic()
        try:
            faults = work()
        except macos_wheel.FetchError as error:
            faults = [str(error)]
        self.failed |= bool(faults)
        print(f"{'FAIL' if faults else 'ok  '} {title} ({time.monotonic() - start:.1f} s)", flush=True)
        for fault in faults:
            print(f"     {fault}", flush=True)

    def tools(self) -> list[str]:
        """The compiler and archiver as single executables, for CMake."""
        self.compiler.parent.mkdir(parents=True, exist_ok=True)
        python = f'exec "{sys.executable}"'
        scripts = {
            "mac-c++": f'{python} "{HERE / "compiler.py"}" "{self.sdk}" "$@"',
            "mac-ar": f'{python} -m ziglang ar "$@"',
            "mac-ranlib": f'{python} -m ziglang ranlib "$@"',
        }
        for name, line in scripts.items():
            script = self.compiler.with_name(name)
            script.write_text(f"#!/bin/sh\n{line}\n")
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        shutil.rmtree(self.sdk, ignore_errors=True)
        import nanobind

        sdk.build(self.sdk, inputs.known_good(self.cache), Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym")
        return []

    def build_wheel(self) -> list[str]:
        """With the real build backend; only compiler, torch and metal-cpp are those of the check."""
        for stale in (self.build, self.cache / "dist"):  # zig has a cache of its own
            shutil.rmtree(stale, ignore_errors=True)
        defines = {
            "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake" / "MacCheck.cmake",
            "MFA_MAC_TOOLS": self.compiler.parent,
            "MFA_TORCH_DIR": inputs.torch(inputs.OLDEST, self.cache),  # as a release is built
            "MFA_METAL_CPP_DIR": macos_wheel.metal_cpp(self.cache),
        }
        settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
        settings.append(f"--config-settings=build-dir={self.build}")
        options = ["--no-build-isolation", "--no-deps", "--quiet", f"--wheel-dir={self.cache / 'dist'}"]
        command = [sys.executable, "-m", "pip", "wheel", *options, *settings]
        environment = {**os.environ, **release_environment()}
        done = subprocess.run([*command, str(ROOT)], env=environment, capture_output=True, text=True)
        return [done.stdout + done.stderr] if done.returncode else []

    def built(self, name: str) -> Path:
        """A file of the wheel's package, unpacked."""
        (archive,) = (self.cache / "dist").glob("*.whl")
        with zipfile.ZipFile(archive) as content:
            return Path(content.extract(f"mfa/{name}", self.cache / "unpacked"))

    def link_with(self, version: str) -> list[str]:
        """libmfa's own link command, with another torch."""
        (record,) = self.build.rglob("libmfa.dylib.link.json")
        link = json.loads(record.read_text())
        old = str(inputs.torch(inputs.OLDEST, self.cache) / "lib" / "libtorch_cpu.dylib")
        new = str(inputs.torch(version, self.cache) / "lib" / "libtorch_cpu.dylib")
        if old not in link["command"]:
            return [f"libmfa is not linked with {old}"]
        with tempfile.TemporaryDirectory() as temporary:
            output = str(Path(temporary) / "libmfa.dylib")
            command = [{old: new, link["output"]: output}.get(part, part) for part in link["command"]]
            done = subprocess.run(command, cwd=link["directory"], capture_output=True, text=True)
        return [done.stderr] if done.returncode else []

    def link_names(self, version: str, names: list[str]) -> str:
        """Links a program that uses `names` with a torch. Returns the linker's complaint, empty if there is none."""
        declarations = "\n".join(f'extern char name{i} asm("{name}");' for i, name in enumerate(names))
        uses = " ^ ".join(f"reinterpret_cast<std::uintptr_t>(&name{i})" for i in range(len(names)))
        torch = inputs.torch(version, self.cache) / "lib" / "libtorch_cpu.dylib"
        with tempfile.TemporaryDirectory() as temporary:
            source, thing, library = (Path(temporary) / f"control.{suffix}" for suffix in ("cpp", "o", "dylib"))
            source.write_text(CONTROL.format(declarations=declarations, uses=uses))
            for arguments in (["-O2", "-c", source, "-o", thing], ["-dynamiclib", thing, torch, "-o", library]):
                done = subprocess.run([self.compiler, *arguments], capture_output=True, text=True)
                if done.returncode:
                    return done.stderr
        return ""

    def control(self) -> list[str]:
        """A strict link must fail for what doesn't exist: C++ with Objective-C types, or a misspelt name."""
        faults = []
        for name in ("__ZN2at3mps19getCurrentMPSStreamEi", "_aoti_torch_mps_no_such_function"):
            if name not in self.link_names(self.versions[0], [name]):
                faults.append(f"{name} links, though it doesn't exist: the link is not strict")
        return faults

    def add_newest(self) -> list[str]:
        newest = inputs.newest_torch()
        if newest not in self.versions:
            self.versions.append(newest)
        return []

    def run(self) -> bool:
        self.step("the inputs, and an SDK of stubs", self.tools)
        if self.failed:
            return False
        self.step(f"the wheel builds, with the headers of torch {inputs.OLDEST}", self.build_wheel)
        if self.failed:
            return False
        ops, extension = self.built("libmfa.dylib"), self.built("_native.abi3.so")
        self.step("libmfa.dylib: imports, exports, loader commands", lambda: binary.ops_faults(ops))
        self.step("_native.abi3.so: imports, exports, loader commands", lambda: binary.extension_faults(extension))
        self.step("the wheel: tags, files, metadata", lambda: wheel.faults(self.cache / "dist"))
        names = binary.looked_up(ops)
        if self.newest:
            self.step("the newest torch is linked with as well", self.add_newest)
        for version in self.versions:
            self.step(f"libmfa links with torch {version}", lambda version=version: self.link_with(version))
            self.step(
                f"torch {version} has the {len(names)} functions that libmfa looks up",
                lambda version=version: list(filter(None, [self.link_names(version, names)])),
            )
        self.step("the control: names that don't exist fail to link", self.control)
        return not self.failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mac-check", description=__doc__.splitlines()[0])
    default = f"{' '.join(inputs.TORCH)}, and the newest"
    parser.add_argument("--torch", nargs="+", metavar="VERSION", help=f"releases to link with (default: {default})")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "mac-check", help="2 GB for all of them")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.cache.resolve(), arguments.torch or list(inputs.TORCH), newest=arguments.torch is None)
    sys.exit(0 if check.run() else "mac-check failed")


if __name__ == "__main__":
    main()
