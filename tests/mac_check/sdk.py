"""A macOS SDK of linker stubs (.tbd), made of what real macOS binaries import.

A binary that runs on macOS proves, for every symbol that it imports, that the library it names provides it. The set is
a lower bound: if a symbol that macOS surely has is reported as undefined, add a wheel that uses it to inputs.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import lief

lief.logging.disable()  # it complains of export tries that zig leaves empty
CLASS = "_OBJC_CLASS_$_"
METACLASS = "_OBJC_METACLASS_$_"
# Every libc++ instantiates this (the first list of its header __string/extern_template_lists.h), but Apple's compiler
# calls it rarely, and none of the binaries that we look into does.
INSTANTIATED = {
    "/usr/lib/libc++.1.dylib": {
        "__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEE21__grow_by_and_replaceEmmmmmmPKc"
    }
}
STUB = """--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{install_name}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
    objc-classes: [ {classes} ]
...
"""


def arm64(path: Path) -> lief.MachO.Binary:
    fat = lief.MachO.parse(str(path))
    if fat is None:
        raise ValueError(f"{path} is no Mach-O file")
    return fat.take(lief.MachO.Header.CPU_TYPE.ARM64)


def imports_by_library(binary: lief.MachO.Binary) -> dict[str, set[str]]:
    """Install name -> symbols that `binary` binds to it."""
    result: dict[str, set[str]] = defaultdict(set)
    for binding in binary.bindings:
        if binding.has_symbol and binding.has_library:
            result[binding.library.name].add(binding.symbol.name)
    return result


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def write_stub(path: Path, install_name: str, names: set[str]) -> None:
    classes = {name.removeprefix(CLASS) for name in names if name.startswith(CLASS)}
    symbols = {name for name in names if not name.startswith((CLASS, METACLASS))}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB.format(install_name=install_name, symbols=quoted(symbols), classes=quoted(classes)))


def stub_path(sdk: Path, install_name: str) -> Path:
    if framework := re.search(r"/(\w+)\.framework/", install_name):
        name = framework[1]
        return sdk / "System/Library/Frameworks" / f"{name}.framework" / f"{name}.tbd"
    name = Path(install_name).name.split(".")[0]
    return sdk / "usr/lib" / ("libc++stub.tbd" if name == "libc++" else f"{name}.tbd")  # see compiler.py


def build(sdk: Path, known_good: Iterable[Path], python_symbols: Path) -> None:
    known: dict[str, set[str]] = defaultdict(set, INSTANTIATED)
    for path in known_good:
        for library, names in imports_by_library(arm64(path)).items():
            if library.startswith(("/System/", "/usr/lib/")) and "libSystem" not in library:  # zig has that one whole
                known[library] |= names
    for library, names in known.items():
        write_stub(stub_path(sdk, library), library, names)
    # An extension module finds the interpreter's symbols in the process; nanobind lists those that it may use.
    names = set(re.findall(r"-U (\S+)", python_symbols.read_text()))
    write_stub(sdk / "usr/lib/libpython.tbd", "@executable_path/python", names)
