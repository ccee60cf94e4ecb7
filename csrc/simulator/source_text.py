"""Finding one's way in MSL text with regular expressions: masked copies, brackets, edits that keep line numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

VECTOR = r"(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]"
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
Edit = tuple[int, int, str]  # begin, end, replacement


class TranslationError(Exception):
    """MSL that is rejected before the compiler sees it. The message begins with file:line."""


def mask(text: str) -> str:
    """The text with directives, line markers and the contents of literals blanked; offsets stay."""
    text = re.sub(r"^[ \t]*#.*$", lambda m: " " * len(m[0]), text, flags=re.M)
    literal = r'"(?:\\.|[^"\\\n])*"' + r"|'(?:\\.|[^'\\\n])+'"
    return re.sub(literal, lambda m: m[0][0] + "_" * (len(m[0]) - 2) + m[0][-1], text)


def flat(text: str) -> str:
    """The text on one line, without line markers."""
    return " ".join(re.sub(r"^#.*$", "", text, flags=re.M).split())


def apply(text: str, edits: list[Edit]) -> str:
    """Edits never overlap; line breaks and markers of what is replaced are kept behind the replacement."""
    pieces, last = [], 0
    for begin, end, replacement in sorted(edits):
        lines = text[begin:end].split("\n")
        kept = "\n".join(["", *(line if line.startswith("#") else "" for line in lines[1:])])
        pieces += [text[last:begin], replacement, kept]
        last = end
    return "".join([*pieces, text[last:]])


def location(text: str, offset: int) -> str:
    file, line, begin = "<input>", 1, 0
    for marker in re.finditer(r'^# (\d+) "([^"]*)".*$', text[:offset], re.M):
        file, line, begin = marker[2], int(marker[1]) - 1, marker.end()
    return f"{file}:{line + text.count(chr(10), begin, offset)}"


def fail(text: str, offset: int, message: str) -> TranslationError:
    return TranslationError(f"{location(text, offset)}: error: {message}")


def match_bracket(masked: str, start: int) -> int:
    """The offset behind the bracket that closes the one at `start`."""
    expected: list[str] = []
    for i in range(start, len(masked)):
        c = masked[i]
        if c in "([{" or (c == "<" and (not expected or expected[-1] == ">")):
            expected.append(CLOSING[c])
        elif c == expected[-1] and masked[i - 1 : i + 1] != "->":
            expected.pop()
            if not expected:
                return i + 1
    return len(masked)


def split_commas(masked: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Offsets of the comma-separated pieces of masked[start:end]."""
    i = begin = start
    while i < end:
        if masked[i] in "([{<":
            i = min(match_bracket(masked, i), end)
            continue
        if masked[i] == ",":
            yield begin, i
            begin = i + 1
        i += 1
    if masked[begin:end].strip():
        yield begin, end


def quoted(text: str) -> str:
    """A C++ string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
