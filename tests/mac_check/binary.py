"""What a macOS binary of ours must look like."""

import re
from pathlib import Path

import lief

from .sdk import arm64, imports_by_library

SYSTEM = {"/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib"}
METAL = {
    "/usr/lib/libobjc.A.dylib",
    "/System/Library/Frameworks/Metal.framework/Versions/A/Metal",
    "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation",
}
TORCH = "@rpath/libtorch_cpu.dylib"
PYTHON = "@executable_path/python"  # of libpython.tbd, see sdk.py
# C functions of the stable ABI. Anything mangled belongs to one torch release.
STABLE_ABI = re.compile(r"_(aoti_)?torch_\w+")
# Looked up at run time (csrc/metal/torch_queue.cpp), so no linker sees them in libmfa.
LOOKED_UP = re.compile(rb"\0((?:_ZN2at3mps|aoti_torch_mps_)\w+)\0")


def common_faults(binary: lief.MachO.Binary, libraries: set[str]) -> list[str]:
    faults = []
    minos = binary.build_version.minos[:2] if binary.build_version else None
    if minos != [14, 0]:
        faults.append(f"the minimum macOS is {minos}, not 14.0")
    if not binary.header.has(lief.MachO.Header.FLAGS.TWOLEVEL):
        faults.append("symbols are not bound to a library each (two-level namespace)")
    linked = {library.name for library in binary.libraries} - {id_of(binary)}
    if extra := linked - libraries:
        faults.append(f"it links {sorted(extra)}")
    return faults


def id_of(binary: lief.MachO.Binary) -> str | None:
    commands = [c for c in binary.commands if c.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    return commands[0].name if commands else None


def exports_of(binary: lief.MachO.Binary) -> set[str]:
    return {symbol.name for symbol in binary.exported_symbols} - {"___dso_handle", "__mh_dylib_header"}


def ops_faults(path: Path) -> list[str]:
    """Of libmfa.dylib."""
    binary = arm64(path)
    faults = common_faults(binary, SYSTEM | METAL | {TORCH})
    if id_of(binary) != f"@rpath/{path.name}":
        faults.append(f"its install name is {id_of(binary)}")
    rpaths = {rpath.path for rpath in binary.rpaths}
    if rpaths != {"@loader_path", "@loader_path/../torch/lib"}:
        faults.append(f"its rpaths are {sorted(rpaths)}")
    imports = imports_by_library(binary)
    if not imports[TORCH]:
        faults.append("it imports nothing of torch: the imports were not read")
    unstable = sorted(name for name in imports[TORCH] if not STABLE_ABI.fullmatch(name))
    faults += [f"it imports {name} of torch, which is not in the stable ABI" for name in unstable]
    faults += [f"it exports {name}" for name in sorted(exports_of(binary)) if not name.startswith("_mfa_")]
    if len(looked_up(path)) < 5:
        faults.append(f"it looks up {looked_up(path)} in torch; the Metal backend looks up five functions")
    return faults


def extension_faults(path: Path) -> list[str]:
    """Of _native.abi3.so, which knows neither torch nor Metal."""
    binary = arm64(path)
    faults = common_faults(binary, SYSTEM | {PYTHON})
    extra = exports_of(binary) - {"_PyInit__native"}
    # The plan is linked into both, with what libmfa exports of it.
    return faults + [f"it exports {name}" for name in sorted(extra) if not name.startswith("_mfa_")]


def looked_up(path: Path) -> list[str]:
    """Names that the binary looks up in torch, as the linker writes them."""
    return sorted({"_" + name.decode() for name in LOOKED_UP.findall(path.read_bytes().replace(b"\0", b"\0\0"))})
