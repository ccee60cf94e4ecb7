"""MSL rules that a C++ compiler does not check: the address space of every pointer, where threadgroup variables may be,
recursion, casts. Works on the source text; `lint.py files...` prints file:line: message and exits with 1 on findings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from source_text import VECTOR, match_bracket, split_commas

SPACE = re.compile(r"\b(device|constant|threadgroup|thread)\b")
KEYWORDS = {
    "if",
    "constexpr",
    "for",
    "while",
    "switch",
    "return",
    "sizeof",
    "alignas",
    "decltype",
    "static_assert",
    "catch",
}
# Words that begin a statement which is no declaration.
NOT_A_TYPE = {"return", "else", "case", "delete", "throw", "using", "typedef", "goto", "do", "operator"}
ATTRIBUTE = re.compile(r"\[\[.*?\]\]", re.S)

Report = Callable[[int, str], None]  # offset, message


@dataclass
class Function:
    """A definition: offsets of its declaration, parameters and body in the cleaned text."""

    name: str
    start: int
    parameters: tuple[int, int]
    body: tuple[int, int]
    is_template: bool
    is_kernel: bool


@dataclass(frozen=True, order=True)
class Finding:
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def clean(text: str) -> str:
    """Comments, literals and directives blanked; offsets and lines stay."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    text = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)


def without_arguments(text: str) -> str:
    """Attributes and the contents of <..>, (..) and [..] blanked."""
    text, last = ATTRIBUTE.sub(lambda m: " " * len(m[0]), text), ""
    while last != text:
        last, text = text, re.sub(r"<[^<>()]*>|\([^()]*\)|\[[^\[\]]*\]", lambda m: " " * len(m[0]), text)
    return text


def functions(text: str) -> Iterator[Function]:
    for found in re.finditer(r"(?:\b(operator\s*\S{1,3}?)|\b(\w+))\s*\(", text):
        name = found[1] or found[2]
        if name in KEYWORDS:
            continue
        close = match_bracket(text, found.end() - 1)
        tail = re.compile(
            r"\s*(?:\[\[.*?\]\]\s*|const\b\s*|thread\b\s*|device\b\s*|noexcept\b\s*)*(\{|:(?!:))", re.S
        ).match(text, close)
        if tail is None:
            continue
        opening = tail.end() - 1
        if text[opening] == ":":  # member initialisers; a ternary or a label has no such body
            body = re.compile(r":(?:\s*\w+(?:<[^;{}]*?>)?\s*(\()[^;{}]*?\)\s*,?)+\s*\{").match(text, opening)
            if body is None:
                continue
            opening = body.end() - 1
        start = max(text.rfind(c, 0, found.start()) for c in ";{}") + 1
        before = text[start : found.start()]
        if "=" in re.sub(r"<[^;{}]*>", "", before) or re.search(r"(?:,|(?<!:):)\s*$", before):
            continue  # an initialiser
        is_kernel = re.search(r"\bkernel\b", before) is not None
        span = (found.end(), close - 1)
        yield Function(name, start, span, (opening, match_bracket(text, opening)), "template" in before, is_kernel)


def statements(text: str, begin: int, end: int) -> Iterator[tuple[int, str]]:
    """Pieces between ; { } and behind `for (`, with their offsets."""
    for found in re.compile(r"[^;{}]+").finditer(text, begin, end):
        inner = re.match(r"\s*for\s*\(\s*", found[0])
        skip = inner.end() if inner else 0
        yield found.start() + skip, found[0][skip:]


def check_parameters(text: str, function: Function, report: Report) -> None:
    for begin, end in split_commas(text, *function.parameters):
        written = text[begin:end].split("=")[0]
        if re.search(r"[*&]", without_arguments(written)) and not SPACE.search(written):
            name = " ".join(ATTRIBUTE.sub("", written).split())
            report(begin + len(written) - len(written.lstrip()), f"no address space on the parameter '{name}'")
    before = text[function.start : function.parameters[0] - 1]
    before = before[: before.rfind(function.name)]
    if re.search(r"[*&]", without_arguments(before)) and not SPACE.search(before):
        report(function.parameters[0], f"no address space on what {function.name} returns")


def check_declarations(text: str, report: Report) -> None:
    """Variables, members and casts to pointers or references."""
    declaration = re.compile(
        r"\s*(?:(?:const|static|constexpr|typename|struct|volatile)\s+)*([A-Za-z_][\w:]*)\s*(?:const\s*)?[*&]+\s*(?:const\s+)?"
        r"([A-Za-z_]\w*)\s*(?:=(?!=)|\[|,|:(?!:)|$)"
    )
    for offset, statement in statements(text, 0, len(text)):
        bare = without_arguments(re.sub(r"^\s*(?:public|private|protected)\s*:", lambda m: " " * len(m[0]), statement))
        found = declaration.match(bare)
        if found and found[1] not in NOT_A_TYPE and not SPACE.search(bare[: found.end()]):
            report(offset + found.start(2), f"no address space on '{found[2]}'")
    for found in re.finditer(r"\b(?:static|reinterpret|const)_cast\s*(<)", text):
        target = text[found.start(1) + 1 : match_bracket(text, found.start(1)) - 1]
        if re.search(r"[*&]", target) and not SPACE.search(target):
            report(found.start(), f"no address space in the cast to '{target.strip()}'")
    for found in re.finditer(r"(?<![\w>\])\s])\s*\(\s*((?:const\s+)?[\w:]+(?:<[^<>]*>)?\s*\*+)\s*\)\s*[\w(&]", text):
        report(found.start(1), f"no address space in the cast to '{found[1].strip()}'")


def check_threadgroup_variables(text: str, function: Function, report: Report) -> None:
    for offset, statement in statements(text, *function.body):
        found = re.match(r"\s*threadgroup\s", statement)
        if not found or re.search(r"[*&]", without_arguments(statement).split("=")[0]):
            continue
        begin = offset + len(statement) - len(statement.lstrip())
        if not function.is_kernel:
            report(begin, f"a threadgroup variable in {function.name}, which is no kernel")
        elif "=" in without_arguments(statement):
            report(begin, "a threadgroup variable has no initialiser")


def check_casts(text: str, function: Function, report: Report) -> None:
    """Casts between the address spaces of names declared in this function."""
    spaces: dict[str, str] = {}
    pieces = [text[b:e] for b, e in split_commas(text, *function.parameters)]
    pieces += [statement for _, statement in statements(text, *function.body)]
    for piece in pieces:
        declared = re.match(
            r"\s*(?:const\s+)?(device|constant|threadgroup|thread)\b[\w\s:<>,]*?[\s*&]+(\w+)\s*(?:=|\[|,|$)", piece
        )
        if declared:
            spaces[declared[2]] = declared[1]
    target = r"([^()<>;]*\b(device|constant|threadgroup|thread)\b[^();]*?[*&])"
    cast = rf"(?:\(|reinterpret_cast\s*<){target}\s*(?:\)|>\s*\()\s*[(&]*\s*(\w+)"
    for found in re.compile(cast).finditer(text, *function.body):
        known = spaces.get(found[3])
        if known and known != found[2]:
            report(found.start(), f"a cast of '{found[3]}' from {known} to {found[2]}")


def check_words(text: str, report: Report) -> None:
    for found in re.finditer(rf"(?<![\w>\])])\s*\(\s*((?:metal::)?(?:{VECTOR}|vec\s*<[^<>()]*>))\s*\)\s*[\w(]", text):
        if not re.search(r"\b(?:sizeof|alignof|decltype)\s*$", text[: found.start() + 1]):
            report(found.start(1), f"a C-style cast to {found[1]}: write {found[1]}(..)")
    for found in re.finditer(rf"\b(?:{VECTOR[:-5]})8\b|\bvec\s*<[^<>;]*,\s*8\s*>", text):
        report(found.start(), f"no vector of this size exists: {found[0]}")
    for found in re.finditer(r"\bgoto\b", text):
        report(found.start(), "goto")


def check_absent_arguments(text: str, function: Function, report: Report) -> None:
    """Arithmetic on a kernel's argument where its function constant may be off: there is no pointer then."""
    for begin, end in split_commas(text, *function.parameters):
        found = re.search(r"(\w+)\s*\[\[.*function_constant\s*\(\s*(\w+)", text[begin:end], re.S)
        if not found:
            continue
        name, constant = found.groups()
        guards = re.finditer(rf"\bif\s*(?=\([^{{}};]*\b{constant}\b)", text[slice(*function.body)])
        guarded = [guarded_span(text, function.body[0] + guard.end()) for guard in guards]
        for use in re.compile(rf"\b{name}\s*[+\[-]|[+-]\s*{name}\b").finditer(text, *function.body):
            statement = text[max(text.rfind(c, 0, use.start()) for c in ";{}") : use.start()]
            is_chosen = re.search(rf"\b{constant}\b[^:]*\?", statement)
            if not is_chosen and not any(a <= use.start() < b for a, b in guarded):
                report(use.start(), f"arithmetic on '{name}', which exists only where {constant} is on")


def guarded_span(text: str, condition: int) -> tuple[int, int]:
    """What an `if` guards; `condition` is the offset of its parenthesis."""
    begin = match_bracket(text, condition)
    block = re.compile(r"\s*\{").match(text, begin)
    return begin, match_bracket(text, block.end() - 1) if block else text.index(";", begin)


def check_recursion(texts: dict[str, str], known: dict[str, list[Function]], reports: dict[str, Report]) -> None:
    """Among functions that are neither templates nor overloaded: elsewhere a name does not tell who is called."""
    count: dict[str, int] = {}
    for function in (f for functions_ in known.values() for f in functions_):
        count[function.name] = count.get(function.name, 0) + 1
    places = {f.name: (file, f) for file, fs in known.items() for f in fs if count[f.name] == 1 and not f.is_template}
    calls = {
        name: set(re.findall(r"(?<![.>\w])(\w+)\s*\(", texts[file][slice(*f.body)])) & places.keys()
        for name, (file, f) in places.items()
    }
    for name, (file, function) in places.items():
        reached, frontier = set(), set(calls[name])
        while frontier:
            reached |= frontier
            frontier = {callee for caller in frontier for callee in calls[caller]} - reached
        if name in reached:
            reports[file](function.parameters[0], f"{name} is recursive")


def lint(files: Sequence[str | Path]) -> list[Finding]:
    findings: set[Finding] = set()
    texts = {str(file): clean(Path(file).read_text()) for file in files}

    def reporter(file: str) -> Report:
        text = texts[file]
        return lambda offset, message: findings.add(Finding(file, text.count("\n", 0, offset) + 1, message))

    reports = {file: reporter(file) for file in texts}
    known = {file: list(functions(text)) for file, text in texts.items()}
    for file, text in texts.items():
        check_declarations(text, reports[file])
        check_words(text, reports[file])
        for function in known[file]:
            check_parameters(text, function, reports[file])
            check_threadgroup_variables(text, function, reports[file])
            check_casts(text, function, reports[file])
            if function.is_kernel:
                check_absent_arguments(text, function, reports[file])
    check_recursion(texts, known, reports)
    return sorted(findings)


def main(arguments: Sequence[str] | None = None) -> int:
    findings = lint(sys.argv[1:] if arguments is None else arguments)
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
