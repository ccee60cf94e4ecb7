"""Compiles what the driver's tests need, into .cache/driver; each part again only when what it is made of changes.

The driver itself is the package's.
"""

import fcntl
import functools
import hashlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mfa import _library

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SIMULATOR = REPOSITORY / "csrc" / "simulator"
DRIVER = SIMULATOR / "driver"
CACHE = REPOSITORY / ".cache" / "driver"
GXX = ("g++", "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


class BuildError(Exception):
    """The command and what it said."""


@contextmanager
def locked() -> Iterator[None]:
    """One process builds; the others wait and find it done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Iterable[object]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(["nice", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def make(output: Path, inputs: Iterable[Path], command: Iterable[object]) -> Path:
    """Runs the command unless `output` came from the same command on the same inputs."""
    words = [str(word) for word in command]
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(inputs):
        digest.update(path.name.encode() + path.read_bytes())
    stamp = output.with_name(output.name + ".stamp")
    if not (output.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
        output.parent.mkdir(parents=True, exist_ok=True)
        run(words)
        stamp.write_text(digest.hexdigest())
    return output


def compile_all(
    folder: str, sources: Iterable[Path], headers: Iterable[Path], flags: Iterable[object] = ()
) -> list[Path]:
    """Objects by the system's compiler."""
    headers, flags = list(headers), list(flags)
    objects = []
    for source in sorted(sources):
        output = CACHE / folder / f"{source.name}.o"
        objects.append(make(output, [source, *headers], [*GXX, *flags, "-c", source, "-o", output]))
    return objects


def link(name: str, objects: Iterable[Path], *libraries: object, folder: Path = CACHE) -> Path:
    objects = list(objects)
    output = folder / f"lib{name}.so"
    package = driver().parent
    command = ["g++", "-shared", "-o", output, *objects, f"-L{package}", *libraries]
    return make(output, objects, [*command, f"-Wl,-rpath,{package}", "-Wl,--no-undefined"])


def metal_cpp_object(source: Path, inputs: Iterable[Path], output: Path, *flags: object) -> Path:
    """An object of a source that includes metal-cpp, by clang."""
    command = [sys.executable, DRIVER / "compile.py", source, "-o", output, "-O2", "-fvisibility=hidden", *flags]
    return make(output, [source, *inputs, DRIVER / "compile.py", *DRIVER.glob("include/*/*.h")], command)


def driver() -> Path:
    """The package's libmfa_driver.so, beside libmfa_simulator.so and the kernels."""
    return _library.path_of("mfa_driver")


@functools.cache
def kernels() -> Path:
    """The driver tests' own kernels."""
    with locked():
        source, output = HERE / "kernels.metal", CACHE / "kernels.o"
        translate = SIMULATOR / "translate.py"
        inputs = [source, translate, *SIMULATOR.glob("*.py"), SIMULATOR / "engine.h", *SIMULATOR.glob("msl/**/*.h")]
        make(output, inputs, [sys.executable, translate, "--mode", "count", "-o", output, source])
        return link("driver_kernels", [output], "-lmfa_simulator")


@functools.cache
def client() -> Path:
    """The scenarios of client.cpp."""
    with locked():
        inputs = [HERE / "client.h", DRIVER / "control.h", SIMULATOR / "engine.h"]
        output = metal_cpp_object(HERE / "client.cpp", inputs, CACHE / "client.o")
        return link("driver_client", [output], "-lmfa_driver")


@functools.cache
def heap() -> Path:
    """What counts libmfa's allocations, to be preloaded."""
    with locked():
        return link("mfa_heap", compile_all("heap", [HERE / "heap.cpp"], []))


def torch_folder() -> Path:
    import torch

    return Path(torch.__path__[0])


def ops(
    name: str,
    patches: dict[str, tuple[str, str]],
    metal_flags: Iterable[object] = (),
    extra: Iterable[Path] = (),
) -> Path:
    """libmfa with csrc/metal over the driver, from sources with replaced texts: file below csrc/ -> (old, new).

    `metal_flags` are for compiling csrc/metal; `extra` objects are linked in.
    """
    with locked():
        csrc, folder = REPOSITORY / "csrc", CACHE / "ops" / name
        include = torch_folder() / "include"
        flags = ["-DMFA_METAL", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{csrc}", "-isystem", include]
        headers = [
            *(header for room in ("ops", "plan", "metal") for header in (csrc / room).glob("*.[hd]*")),
            *(REPOSITORY / "metal").glob("*.[hd]*"),
        ]
        embedded = CACHE / "ops" / "kernel_sources.cpp"
        embed = REPOSITORY / "cmake" / "embed_kernels.py"
        metal = sorted((REPOSITORY / "metal").glob("*.metal"))
        make(embedded, [embed, *metal, *headers], [sys.executable, embed, embedded, *metal])

        objects = []
        hosts = [csrc / "library.cpp", *csrc.glob("ops/*.cpp"), *csrc.glob("plan/*.cpp")]
        for source in sorted([*hosts, *csrc.glob("metal/*.cpp"), embedded]):
            relative = "" if source == embedded else str(source.relative_to(csrc))
            place = CACHE / "ops" / "base"
            if relative in patches:
                old, new = patches[relative]
                text = source.read_text()
                if text.count(old) != 1:
                    raise BuildError(f"{relative} has the text {old!r} {text.count(old)} times, not once")
                place = folder
                mutated = folder / relative
                mutated.parent.mkdir(parents=True, exist_ok=True)
                mutated.write_text(text.replace(old, new))
                source = mutated
            output = place / f"{relative.replace('/', '-') or source.name}.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            if relative.startswith("metal/") and metal_flags:
                output = folder / output.name
            if relative.startswith("metal/") or not relative:
                more = metal_flags if relative else ()
                objects.append(metal_cpp_object(source, headers, output, *flags, *more))
            else:
                objects.append(make(output, [source, *headers], [*GXX, *flags, "-g0", "-c", source, "-o", output]))
        objects += extra
        lib = torch_folder() / "lib"
        return link("mfa", objects, "-lmfa_driver", f"-L{lib}", "-ltorch_cpu", f"-Wl,-rpath,{lib}", folder=folder)


@functools.cache
def mps_device() -> Path:
    """The stand-in `mps` device for the torch of this Python."""
    import torch

    folder = torch_folder()
    with locked():
        device = SIMULATOR / "mps_device"
        includes = ["-isystem", folder / "include", "-isystem", folder / "include/torch/csrc/api/include"]
        headers = [*device.glob("*.h"), DRIVER / "control.h"]
        objects = compile_all(f"mps_device-{torch.__version__}", device.glob("*.cpp"), headers, includes)
        libraries = (f"-L{folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{folder / 'lib'}")
        return link("mfa_mps_device", objects, "-lmfa_driver", *libraries)
