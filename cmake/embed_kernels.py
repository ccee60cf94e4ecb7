"""Writes the kernels as C++ strings, for a build without a metallib: embed_kernels.py OUTPUT KERNEL.metal ...

Each source becomes one string that compiles by itself: our own headers are inlined, those of Metal stay included.
"""

import argparse
import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
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


def literal(text: str) -> str:
    if f'){DELIMITER}"' in text:
        sys.exit(f"a kernel contains the delimiter {DELIMITER}")
    return f'R"{DELIMITER}({text}){DELIMITER}"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("kernels", type=Path, nargs="+")
    arguments = parser.parse_args()
    rows = [f'    {{"{kernel.stem}", {literal(inline(kernel, set()))}}},' for kernel in arguments.kernels]
    text = "\n".join(
        [
            '#include "metal/library.h"',
            "",
            "static constexpr mfa::metal::KernelSource kSources[] = {",
            *rows,
            "};",
            "",
            "std::span<const mfa::metal::KernelSource> mfa::metal::kernel_sources() { return kSources; }",
            "",
        ]
    )
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
