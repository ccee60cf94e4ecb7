"""Writes the kernels as C++ strings, for a build without a metallib: embed_kernels.py OUTPUT KERNEL.metal ...

Each source becomes one string that compiles by itself: our own headers are inlined, those of Metal stay included.
Beside it stand the host names of its kernels, so that whoever wants one of them need compile no other source.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
INCLUDE_OF_METAL = re.compile(r"^\s*#\s*include\s+<.*$", re.MULTILINE)
HOST_NAME = re.compile(r'host_name\s*\(((?:\s*"[^"]*")+)\s*\)')
ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
DELIMITER = "MSL"


def inline(path: Path, seen: set[Path]) -> str:
    """The text of `path`. `seen` are the headers with #pragma once that the source has already."""
    path = path.resolve()
    if path in seen:
        return ""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if ONCE.match(line):
            seen.add(path)
        elif include := INCLUDE.match(line):
            lines.append(inline(path.parent / include[1], seen) + f'#line {number + 1} "{path.name}"')
        else:
            lines.append(line)
    # Metal's messages then name the header and its line, as they do in an ordinary build.
    return f'#line 1 "{path.name}"\n' + "\n".join(lines) + "\n"


def host_names(text: str, compiler: str = "c++") -> list[str]:
    """The kernels of a source that inline() made. Macros compose their names: any C++ compiler expands them."""
    command = [compiler, "-x", "c++", "-E", "-P", "-D__METAL_VERSION__=310", "-"]
    done = subprocess.run(command, input=INCLUDE_OF_METAL.sub("", text), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return ["".join(re.findall(r'"([^"]*)"', literals)) for literals in HOST_NAME.findall(done.stdout)]


def literal(text: str) -> str:
    if f'){DELIMITER}"' in text:
        sys.exit(f"a kernel contains the delimiter {DELIMITER}")
    return f'R"{DELIMITER}({text}){DELIMITER}"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("kernels", type=Path, nargs="+")
    parser.add_argument("--compiler", default="c++", help="of C++, as a preprocessor")
    arguments = parser.parse_args()
    names, rows = [], []
    for kernel in arguments.kernels:
        text = inline(kernel, set())
        quoted = ", ".join(f'"{name}"' for name in host_names(text, arguments.compiler))
        names.append(f"static constexpr const char* {kernel.stem}_kernels[] = {{{quoted}}};")
        rows.append(f'    {{"{kernel.stem}", {literal(text)}, {kernel.stem}_kernels}},')
    lines = [
        '#include "metal/library.h"',
        "",
        *names,
        "",
        "static constexpr mfa::metal::KernelSource kSources[] = {",
        *rows,
        "};",
        "",
        "std::span<const mfa::metal::KernelSource> mfa::metal::kernel_sources() { return kSources; }",
        "",
    ]
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
