"""Compiles Metal kernels for the simulator: clang -E, rewrite, clang against msl/shim.h, a look at the symbols.

As a program it makes one object; build_library() makes a shared library that mfa_sim_open() loads.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rewrite import rewrite
from source_text import TranslationError

MSL = Path(__file__).parent / "msl"
# Empty while preprocessing, so that MSL's keywords survive; shim.h declares all of them afterwards.
STANDARD_HEADERS = [
    "metal_algorithm",
    "metal_array",
    "metal_assert",
    "metal_atomic",
    "metal_common",
    "metal_compute",
    "metal_config",
    "metal_extended_vector",
    "metal_geometric",
    "metal_graphics",
    "metal_integer",
    "metal_limits",
    "metal_logging",
    "metal_math",
    "metal_matrix",
    "metal_numeric",
    "metal_pack",
    "metal_packed_vector",
    "metal_quadgroup",
    "metal_raytracing",
    "metal_relational",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_stdlib",
    "metal_texture",
    "metal_tuple",
    "metal_type_traits",
    "metal_types",
    "metal_uniform",
    "metal_utility",
    "metal_visible_function_table",
]
METAL4_HEADERS = [
    "metal_cooperative_tensor",
    "metal_tensor",
    "MetalPerformancePrimitives/MetalPerformancePrimitives.h",
]
PREDEFINED = ["__METAL__=1", "__METAL_VERSION__=310", "__HAVE_BFLOAT__=1", "__METAL_MACOS__=1", "__MFA_SIMULATOR__=1"]

LANGUAGE = [
    "-x",
    "c++",
    "-std=c++17",
    "-nostdinc",
    "-nostdinc++",
    "-fno-exceptions",
    "-fno-rtti",
    "-fPIC",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",
    "-fsigned-char",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=on",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Xclang",
    "-cl-single-precision-constant",
    "-fno-lax-vector-conversions",
    "-fno-sanitize=undefined",
]
# What Metal 4 changes of the above. C++20 for classes as template arguments, an extension of Apple's compiler.
METAL4 = {"-std=c++17": "-std=c++20", "-D__METAL_VERSION__=310": "-D__METAL_VERSION__=400"}
STANDARDS = ("metal3.1", "metal4.0")
# filter_diagnostics() reads what these say.
WARNINGS = ["-Wimplicit-float-conversion", "-Wdouble-promotion", "-Wno-implicit-int-float-conversion"]
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-error=implicit-float-conversion", "-Wno-error=double-promotion"]
PATTERN = "-ftrivial-auto-var-init=pattern"  # variables start as NaN, so that what was forgotten is seen
MODES = {
    "fast": "-Os -DMFA_SIM_FAST",
    "count": f"{PATTERN} -O2 -gdwarf-4 -g1 -gno-column-info -DMFA_SIM_COUNT -fsanitize=thread "
    "-mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-atomics=0 "
    "-mllvm -tsan-instrument-read-before-write=1 "
    "-fno-vectorize -fno-slp-vectorize -mprefer-vector-width=128",
    "asan": f"{PATTERN} -O1 -g -gdwarf-4 -DMFA_SIM_ASAN -fsanitize=address,undefined -fno-sanitize=vptr,function "
    "-fno-sanitize-recover=undefined",
}
MACHINES = {"x86_64": "-march=x86-64-v3", "aarch64": "-march=armv8.2-a+fp16", "arm64": "-march=armv8.2-a+fp16"}


TRIED_VERSIONS = (22,)  # of clang, by our tests; that of the package ziglang is one


class CompileError(Exception):
    """The compiler's text; its lines name the .metal or .h."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The clang inside the ziglang package, so that neither verdicts nor counts depend on what a machine has installed;
    or the one that MFA_CLANG names."""
    if chosen := os.environ.get("MFA_CLANG"):
        try:
            text = subprocess.run([chosen, "--version"], capture_output=True, text=True, check=False).stdout
        except OSError as error:
            raise CompileError(f"MFA_CLANG: {error}") from None
        version = re.search(r"clang version (\d+)", text)
        if version is None or int(version[1]) not in TRIED_VERSIONS:
            found = f"version {version[1]}" if version else "no clang"
            tried = ", ".join(map(str, TRIED_VERSIONS))
            raise CompileError(f"MFA_CLANG: {chosen} is {found}; kernels have been tried with {tried} only")
        return (chosen,)
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise CompileError("the simulator's compiler is missing: install the package ziglang")
    return (str(Path(spec.origin).parent / "zig"), "clang", f"--target={platform.machine()}-linux-gnu")


def run(command: Sequence[str]) -> str:
    """The command's diagnostics without those that MSL would not give; CompileError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = filter_diagnostics(done.stderr)
    if done.returncode != 0:
        raise CompileError(text or f"{command[0]} failed with status {done.returncode}")
    return text


def filter_diagnostics(text: str) -> str:
    """Without warnings of implicit conversions; CompileError for those that MSL refuses: anything real to bfloat, and
    bfloat to half."""
    kept: list[str] = []
    includes: list[str] = []
    is_wanted = True
    for line in text.splitlines():
        conversion = re.search(r"warning: implicit conversion .*?: (.*) to (.*) \[-W", line)
        if conversion:
            source, target = conversion.groups()
            if "__bf16" in target or ("__bf16" in source and "_Float16" in target):
                raise CompileError(line.replace("warning:", "error:"))
        if line.startswith("In file included") or line.startswith("                 from"):
            includes.append(line)
            continue
        if re.match(r"\S+:\d+:\d+: (?:warning|error|fatal)", line):
            is_wanted = not conversion
        if is_wanted and not re.match(r"\d+ (?:warning|error)s? .*generated", line):
            kept += [*includes, line]
        includes = []
    return "\n".join(kept)


def of_standard(flags: Sequence[str], standard: str) -> list[str]:
    return [METAL4.get(flag, flag) for flag in flags] if standard == "metal4.0" else [*flags]


def preprocess(
    source: Path,
    directory: str,
    flags: list[str],
    depfile: Path | None,
    target: Path,
    standard: str = "metal3.1",
) -> str:
    headers = Path(directory) / "metal"
    for name in [*STANDARD_HEADERS, *(METAL4_HEADERS if standard == "metal4.0" else [])]:
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).touch()
    output = Path(directory) / "preprocessed"
    dependencies = ["-MMD", "-MT", str(target), "-MF", str(depfile)] if depfile else []
    flags = of_standard([*LANGUAGE, *flags], standard)
    run([*compiler(), *flags, "-E", *dependencies, "-isystem", str(headers), str(source), "-o", str(output)])
    if depfile:
        own = sorted([*MSL.rglob("*.h"), *Path(__file__).parent.glob("*.py"), MSL.parent / "engine.h"])
        names = depfile.read_text().rstrip() + "".join(f" \\\n  {path}" for path in own)
        depfile.write_text(names + "\n")
    return output.read_text()


def compile_file(
    source: str | Path,
    output: str | Path | None,
    *,
    mode: str = "count",
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    flat: bool = False,
    strict: bool = False,
    standard: str = "metal3.1",
    unit_layout: int = 10,
    depfile: str | Path | None = None,
) -> str:
    """One .metal -> one object, or a check of the source alone when `output` is None. Returns the warnings; `strict`
    makes errors of them. `unit_layout`: the Apple GPU family, 9 or 10, whose layout cooperative tensors have."""
    flags = [f"-D{name}" for name in [*PREDEFINED, *defines]] + [f"-I{path}" for path in include_dirs]
    machine = MACHINES.get(platform.machine(), "-O2")
    with tempfile.TemporaryDirectory() as directory:
        target = Path(output or "none")
        text = preprocess(Path(source), directory, flags, Path(depfile) if depfile else None, target, standard)
        try:
            translated = rewrite(text)
        except TranslationError as error:
            raise CompileError(str(error)) from None
        file = Path(directory) / "translated.cc"
        file.write_text(translated)
        shim = ["-isystem", str(MSL / "freestanding"), "-include", str(MSL / "shim.h")]
        shim += ["-DMFA_SIM_FLAT"] if flat else []
        shim += [f"-DMFA_SIM_UNIT_LAYOUT={unit_layout}"] if standard == "metal4.0" else []
        result = ["-fsyntax-only"] if output is None else ["-c", "-o", str(output)]
        language = of_standard(LANGUAGE, standard)
        flags = [*language, *WARNINGS, *(STRICT if strict else []), machine, *MODES[mode].split(), *shim]
        warnings = run([*compiler(), *flags, str(file), *result])
    if output is not None:
        check_symbols(Path(output))
    return warnings


def check_symbols(path: Path) -> None:
    """MSL has no writable globals and no static locals; the shim's own carry mfa_sim in their names."""
    found = [name for name in writable_symbols(path.read_bytes()) if "mfa_sim" not in name and name[:2] != "__"]
    if found:
        path.unlink()
        raise CompileError(
            f"{path.name}: error: writable globals or static locals, which MSL has not: {', '.join(found)}"
        )


def writable_symbols(data: bytes) -> Iterator[str]:
    """Names of data objects in writable sections of a 64-bit little-endian ELF object."""
    if data[:4] != b"\x7fELF":
        return
    table, size, count, names_at = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HHH", data, 58)
    sections = [
        struct.unpack_from("<IIQQQQII", data, table + i * size) for i in range(count)
    ]  # name type flags . at size link

    def text(section: int, offset: int) -> str:
        begin = sections[section][4] + offset
        return data[begin : data.index(b"\0", begin)].decode()

    for _, kind, _, _, at, length, link, _ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for offset in range(at, at + length, 24):
            symbol, info, _, index, _, _ = struct.unpack_from("<IBBHQQ", data, offset)
            if info & 15 != 1 or not 0 < index < count:  # STT_OBJECT
                continue
            section = sections[index]
            if section[2] & 1 and not text(names_at, section[0]).startswith(".data.rel.ro"):  # SHF_WRITE
                yield text(link, symbol)


def link_library(objects: Sequence[Path], output: Path, engine_library: Path, mode: str) -> None:
    """With the system's compiler driver, or zig's. Explicitly against the engine: nothing is left to lazy binding."""
    driver = shutil.which("cc") or shutil.which("c++")
    command = [driver] if driver else [sys.executable, "-m", "ziglang", "cc"]
    runtime = ["-fsanitize=address,undefined"] if mode == "asan" else []
    rpath = f"-Wl,-rpath,{engine_library.parent.resolve()}"
    run([*command, "-shared", "-o", str(output), *map(str, objects), str(engine_library), rpath, *runtime, "-lm"])


def build_library(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    mode: str = "count",
    include_dirs: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    engine_library: str | Path,
    flat: bool = False,
    standard: str = "metal3.1",
    unit_layout: int = 10,
    jobs: int | None = None,
) -> Path:
    """Compiles in parallel and links. `output` is the shared library; objects are temporary."""
    output = Path(output)
    options = {"mode": mode, "include_dirs": include_dirs, "defines": defines, "flat": flat}
    options |= {"standard": standard, "unit_layout": unit_layout}
    with tempfile.TemporaryDirectory() as directory:
        objects = [Path(directory) / f"{i}.o" for i in range(len(sources))]
        with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            list(pool.map(lambda pair: compile_file(*pair, **options), zip(sources, objects, strict=True)))  # type: ignore[arg-type]
        link_library(objects, output, Path(engine_library), mode)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile one .metal file for the simulator.")
    parser.add_argument("source")
    parser.add_argument("-o", dest="output", required=True, help="object file")
    parser.add_argument("--mode", choices=sorted(MODES), default="count")
    parser.add_argument("-I", dest="include_dirs", action="append", default=[], metavar="DIR")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--flat", action="store_true", help="no address spaces (third-party code only)")
    parser.add_argument("--strict", action="store_true", help="every warning is an error")
    parser.add_argument("--standard", choices=STANDARDS, default=STANDARDS[0])
    parser.add_argument("--unit-layout", type=int, choices=(9, 10), default=10)
    parser.add_argument("--depfile")
    options = parser.parse_args(arguments)
    try:
        warnings = compile_file(**vars(options))
    except CompileError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if warnings:
        sys.stderr.write(f"{warnings}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
