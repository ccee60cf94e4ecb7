"""clang++ as CMake's Darwin rules want it: zig compiles, and links without its own libc++. Called through mac-c++."""

import json
import os
import sys
from pathlib import Path

TARGET = ["-target", "aarch64-macos.14.0"]
# zig's libc++ is newer than macOS 14's: these keep the code to what that one exports.
COMPILE = [
    "-fno-sized-deallocation",
    "-fno-sanitize=undefined",
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
]
LINKS = {"-bundle", "-dynamiclib", "-shared"}
# For Apple's linker: about size and symbol tables, and the list that libpython.tbd replaces.
DROPPED = ("-Wl,-headerpad", "-Wl,-dead_strip", "-Wl,-x", "-Wl,-S", "-Wl,-search_paths_first", "-Wl,@")
DROPPED_WITH_VALUE = {"-arch", "-isysroot", "-compatibility_version", "-current_version"}


def link_arguments(arguments: list[str], sdk: Path) -> list[str]:
    """What zig's linker is to get for what CMake wants of Apple's."""
    result = []
    rest = iter(argument for argument in arguments if argument not in LINKS)
    for argument in rest:
        if argument in DROPPED_WITH_VALUE:
            next(rest)
        elif argument == "-install_name":
            result.append(f"-Wl,-install_name,{next(rest)}")
        elif argument.endswith("darwin-ld-cpython.sym"):
            result.append(str(sdk / "usr/lib/libpython.tbd"))
        elif not argument.startswith(DROPPED):
            result.append(argument)
    # By path: for -lc++, zig would build and link a libc++ of its own.
    libraries = [str(sdk / "usr/lib/libc++stub.tbd"), f"-L{sdk / 'usr/lib'}", f"-F{sdk / 'System/Library/Frameworks'}"]
    return ["-shared", *libraries, *result]


def main() -> None:
    sdk, arguments = Path(sys.argv[1]), sys.argv[2:]
    zig = [sys.executable, "-m", "ziglang"]
    if LINKS.isdisjoint(arguments):
        command = [*zig, "c++", *TARGET, *COMPILE, *arguments]
    else:
        command = [*zig, "cc", *TARGET, *link_arguments(arguments, sdk)]
        # __main__.py links the same once more against every other torch.
        output = Path(arguments[arguments.index("-o") + 1])
        record = {"directory": str(Path.cwd()), "output": str(output), "command": command}
        output.with_name(output.name + ".link.json").write_text(json.dumps(record))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
