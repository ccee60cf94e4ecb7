"""Mesa's AGX backend with `translator/`, and the clang and LLVM that it reads, in a directory, without root.

Everything comes from Debian's archive through apt, with lists and a cache of its own, from the mirror that the machine
has set up: Mesa's source at a pinned hash, and LLVM as Debian 12 builds it, so that neither the machine's release nor
its installed packages matter. Wanted of the machine: apt, compilers of C and C++, patch, pkg-config, the archive's key.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KEY = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "cc": "gcc", "c++": "g++", "patch": "patch", "pkg-config": "pkgconf"}
MESA = "25.0.7"
MESA_SHA256 = "592272df3cf01e85e7db300c449df5061092574d099da275d19e97ef0510f8a6"
LLVM = "19"
LIBRARIES = [f"libclang-cpp{LLVM}", f"libllvm{LLVM}"]
LIBRARIES += [
    "libbsd0",
    "libedit2",
    "libffi8",
    "libicu72",
    "libmd0",
    "libtinfo6",
    "libxml2",
    "libz3-4",
]  # that those need
# Mesa without any driver: what is left are NIR, the backend, and our program.
OPTIONS = ["-Dbuildtype=debugoptimized", "-Dgallium-drivers=", "-Dvulkan-drivers=", "-Dplatforms=", "-Dopengl=false"]
OPTIONS += [
    f"-D{part}=disabled"
    for part in [
        "egl",
        "expat",
        "gbm",
        "glx",
        "libunwind",
        "llvm",
        "shader-cache",
        "valgrind",
        "xmlconfig",
        "zlib",
        "zstd",
    ]
]


class Toolchain:
    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.packages = self.directory / "packages"
        self.mesa = self.directory / "mesa"
        self.llvm = self.directory / "llvm"
        self.translator = self.directory / "mesa-build/src/asahi/mfa/translator"

    @property
    def clang(self) -> Path:
        return self.llvm / f"usr/lib/llvm-{LLVM}/bin/clang"

    @property
    def environment(self) -> dict[str, str]:
        """For clang and the translator: with the libraries that were unpacked."""
        return {**os.environ, "LD_LIBRARY_PATH": str(next(self.llvm.glob("usr/lib/*-linux-gnu")))}

    def build(self) -> None:
        """Does again only what has changed."""
        missing = [f"{tool} (package {package})" for tool, package in TOOLS.items() if not shutil.which(tool)]
        missing += [] if KEY.exists() else [f"{KEY} (package debian-archive-keyring)"]
        if missing:
            sys.exit(f"agx-check needs {', '.join(missing)}")
        self._fetch()
        self._unpack_llvm()
        self._unpack_mesa()
        self._compile()

    def _fetch(self) -> None:
        if (self.packages / "complete").exists():
            return
        shutil.rmtree(self.packages, ignore_errors=True)
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (self.packages / folder).mkdir(parents=True)
        site = self._mirror()
        sources = self.packages / "sources.list"
        sources.write_text(
            f"deb [signed-by={KEY}] {site} bookworm main\ndeb-src [signed-by={KEY}] {site} trixie main\n"
        )
        settings = {
            "Dir::State": self.packages / "state",
            "Dir::Cache": self.packages / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",  # whoever runs it
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        for command in (
            ["update"],
            ["source", "--download-only", "--tar-only", "mesa"],
            ["download", f"clang-{LLVM}", f"llvm-{LLVM}-dev", *LIBRARIES],
        ):
            subprocess.run([*apt, *command], cwd=self.packages, check=True)
        if hashlib.sha256(self._tarball().read_bytes()).hexdigest() != MESA_SHA256:
            sys.exit(f"agx-check needs Mesa {MESA}'s source, and Debian has another one now: see tests/agx_check")
        (self.packages / "complete").touch()

    def _tarball(self) -> Path:
        return next(self.packages.glob("mesa_*.orig.tar.*"))

    @staticmethod
    def _mirror() -> str:
        listed = subprocess.run(["apt-get", "update", "--print-uris"], capture_output=True, text=True, check=True)
        if found := re.search(r"'(\S+/debian)/dists/", listed.stdout):
            return found[1]
        sys.exit("agx-check needs a mirror of Debian's archive among apt's sources")

    def _unpack_llvm(self) -> None:
        if self.clang.exists():
            return
        partial = self.directory / "llvm.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for package in sorted(self.packages.glob("*.deb")):
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as archive:
                # Of half a gigabyte, headers of the C API and the configuration that they include.
                wanted = [f"./usr/include/llvm-c-{LLVM}", f"./usr/include/llvm-{LLVM}/llvm/Config"]
                only = wanted if package.name.startswith(f"llvm-{LLVM}-dev") else []
                command = ["tar", "-x", "--no-same-owner", "-C", str(partial), *only]
                subprocess.run(command, stdin=archive.stdout, check=True)
        partial.rename(self.llvm)

    def _unpack_mesa(self) -> None:
        patch = HERE / "mesa.patch"
        stamp = self.directory / "mesa.patch"  # the one that was applied
        if stamp.exists() and stamp.read_bytes() == patch.read_bytes():
            return
        stamp.unlink(missing_ok=True)
        shutil.rmtree(self.mesa, ignore_errors=True)
        self.mesa.mkdir()
        unpack = ["tar", "-x", "--no-same-owner", "--strip-components=1", "-C", str(self.mesa), "-f"]
        subprocess.run([*unpack, str(self._tarball())], check=True)
        subprocess.run(["patch", "-s", "-p1", "-i", str(patch)], cwd=self.mesa, check=True)
        (self.mesa / "src/asahi/mfa").symlink_to(HERE / "translator")
        shutil.copy(patch, stamp)

    def _compile(self) -> None:
        build = self.directory / "mesa-build"
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if not (build / "build.ninja").exists():
            command = [sys.executable, "-m", "mesonbuild.mesonmain", "setup", str(build), str(self.mesa), *OPTIONS]
            self._run(command, environment)
        self._run(["ninja", "-C", str(build), str(self.translator.relative_to(build))], environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        """Its output goes to a file, and to the terminal only if it fails."""
        log = self.directory / "build.log"
        with log.open("w") as output:
            code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            sys.exit(f"{log.read_text()[-5000:]}\nagx-check: {command[0]} failed; all of it is in {log}")
