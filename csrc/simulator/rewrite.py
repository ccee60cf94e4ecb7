"""Preprocessed MSL -> C++ that clang compiles against msl/shim.h.

Every step keeps the number of lines and the line markers, so that diagnostics name the .metal or .h. A step searches a
masked copy of the text (strings and line markers blanked, same offsets) and edits the original.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from source_text import VECTOR, Edit, apply, fail, flat, mask, match_bracket, quoted, split_commas


@dataclass
class Kernel:
    name: str
    slots: list[str]  # C++ types of msl/kernel.h
    written: list[str]  # initialisers of mfa_sim::Written
    threads: str  # max_total_threads_per_threadgroup, or empty
    is_template: bool


@dataclass
class Head:
    """What stands around the word `kernel`: attributes, and what the declaration is."""

    start: int
    end: int
    attributes: list[tuple[int, int]]
    kind: str  # "plain", "template", "instantiation"
    template: str = ""


def read_head(masked: str, start: int, end: int, templates: dict[int, int]) -> Head:
    """`templates` maps the end of each `template <..>` to its start."""
    attributes = [(start, end)]
    behind = len(masked[:start].rstrip())
    while masked.endswith("]]", 0, behind):
        begin = masked.rindex("[[", 0, behind)
        attributes.append((begin, behind))
        behind = len(masked[:begin].rstrip())
    first = min(begin for begin, _ in attributes)
    while (following := re.compile(r"\s*\[\[").match(masked, end)) is not None:
        close = masked.index("]]", end) + 2
        attributes.append((following.end() - 2, close))
        end = close
    if behind in templates:
        return Head(templates[behind], end, attributes, "template", masked[templates[behind] : behind])
    if re.search(r"\btemplate$", masked[max(0, behind - 9) : behind]):
        return Head(behind - len("template"), end, attributes, "instantiation")
    return Head(first, end, attributes, "plain")


def attribute(text: str, masked: str, spans: list[tuple[int, int]], name: str) -> str:
    """The argument of an attribute as written, or empty."""
    for begin, end in spans:
        if found := re.compile(rf"\b{name}\s*\(").search(masked, begin, end):
            return flat(text[found.end() : match_bracket(masked, found.end() - 1) - 1])
    return ""


def read_parameter(text: str, masked: str, begin: int, end: int) -> tuple[str, str, list[Edit]]:
    """A kernel parameter's slot, its mfa_sim::Written, and the edits that make it plain C++."""
    spans = [m.span() for m in re.compile(r"\[\[.*?\]\]", re.S).finditer(masked, begin, end)]
    edits = [(b, e, "") for b, e in spans]
    written = flat(apply(masked[begin:end], [(b - begin, e - begin, "") for b, e in spans]))
    declarator = re.fullmatch(r"(.*?)\s*\b(\w+)\s*((?:\[.*\])?)", written)
    if declarator is None:
        raise fail(text, begin, f"cannot read the kernel parameter '{written}'")
    type_, name, extent = declarator.groups()
    constant = attribute(text, masked, spans, "function_constant")
    names = {flat(masked[b + 2 : e - 2]) for b, e in spans}
    builtins = [n for each in names for n in re.split(r"\s*,\s*", each) if re.fullmatch(r"\w+", n)]
    if index := attribute(text, masked, spans, "buffer"):
        slot = f"::mfa_sim::BufferSlot<({index})>"
    elif index := attribute(text, masked, spans, "threadgroup"):
        slot = f"::mfa_sim::ThreadgroupSlot<({index})>"
    elif len(builtins) == 1:
        slot = f"::mfa_sim::BuiltinSlot<::mfa_sim::builtin::{builtins[0]}>"
    elif not spans and re.search(r"\b(device|constant)\b", type_):
        slot = "::mfa_sim::BufferSlot<::mfa_sim::kNextBuffer>"
    else:
        raise fail(text, begin, f"the kernel parameter '{written}' needs one known attribute")
    record = f"{{{quoted(name)}, {quoted(type_ + extent)}, {quoted(constant) if constant else 'nullptr'}}}"
    return slot, record, edits


def threadgroup_variables(text: str, masked: str, begin: int, end: int) -> list[Edit]:
    """`threadgroup T a[N], b;` in a kernel's body -> references into the engine's arena."""
    edits = []
    for found in re.compile(r"(?<=[;{}])\s*(threadgroup\b)").finditer(masked, begin, end):
        start, stop = found.start(1), masked.index(";", found.end())
        pieces = list(split_commas(masked, found.end(), stop))
        flat_pieces = [flat(masked[b:e]) for b, e in pieces]
        if any(re.match(r"[^=\[(]*[*&]", re.sub(r"<.*>", "", piece)) for piece in flat_pieces):
            continue  # a pointer or reference to threadgroup memory is an ordinary variable
        if any("=" in re.sub(r"\[.*?\]", "", piece) for piece in flat_pieces):
            raise fail(text, start, "a threadgroup variable has no initialiser")
        type_, references = "", []
        for (piece_begin, _), piece in zip(pieces, flat_pieces, strict=True):
            match = re.fullmatch(r"((?:alignas\s*\(.*?\)\s*)?(?:.*\S)??)\s*\b(\w+)\s*((?:\[.*\])?)", piece)
            if match is None or not (type_ or match[1]):
                raise fail(text, piece_begin, f"cannot read the threadgroup variable '{piece}'")
            type_ = re.sub(r"alignas\s*\(.*?\)", "", match[1]) or type_
            identity = quoted(f"{match[2]}@{piece_begin}")
            references.append(
                f"auto& {match[2]} = ::mfa_sim::threadgroup_variable<threadgroup {type_} {match[3]}>"
                f"({identity}, {quoted(match[2])});"
            )
        edits.append((start, stop + 1, " ".join(references)))
    return edits


def registration(kernel: Kernel, function: str, name: str, threads: str, number: int) -> str:
    """`number` makes the object's name unique in its file."""
    slots = "".join(f", {slot}" for slot in kernel.slots)
    written = ", ".join([*kernel.written, "{}"])
    return (
        f"static const ::mfa_sim::Registration<&{function}{slots}> mfa_sim_kernel_{number}"
        f"({name}, {{{written}}}, {threads or '0'}, __FILE__, __LINE__);"
    )


def read_definition(text: str, masked: str, head: Head) -> tuple[Kernel, list[Edit], int]:
    """The kernel, the edits of its definition, and where the definition ends (its start for a bare declaration)."""
    signature = re.compile(r"\s*(?:(?:static|inline|METAL_FUNC)\s+)*([\w:]+(?:\s*[*&])*)\s+(\w+)\s*\(").match(
        masked, head.end
    )
    if signature is None or signature[1] != "void":
        raise fail(text, head.end, "a kernel returns void")
    close = match_bracket(masked, signature.end() - 1)
    threads = attribute(text, masked, head.attributes, "max_total_threads_per_threadgroup")
    kernel = Kernel(signature[2], [], [], threads, head.kind == "template")
    edits = [(b, e, "") for b, e in head.attributes]
    for begin, end in split_commas(masked, signature.end(), close - 1):
        slot, written, parameter_edits = read_parameter(text, masked, begin, end)
        kernel.slots.append(slot)
        kernel.written.append(written)
        edits += parameter_edits
    body = re.compile(r"\s*\{").match(masked, close)
    if body is None:
        return kernel, edits, head.start
    end = match_bracket(masked, body.end() - 1)
    return kernel, edits + threadgroup_variables(text, masked, body.end() - 1, end), end


def read_instantiation(text: str, masked: str, head: Head, kernels: dict[str, Kernel], number: int) -> Edit:
    """decltype(f<..>) f<..>; | void f<..>(..); | typedef_name f<..>;"""
    end = masked.index(";", head.end)
    begin = end - len(masked[head.end : end].lstrip())
    if masked.startswith("decltype", begin):
        begin = match_bracket(masked, masked.index("(", begin))
    else:
        begin = re.compile(r"[\w:]+").match(masked, begin).end()  # type: ignore[union-attr]
    found = re.compile(r"\s*((?:\w+\s*::\s*)*(\w+)\s*)<").match(masked, begin)
    if found is None or found[2] not in kernels:
        raise fail(text, head.start, "this instantiates no kernel template with explicit arguments")
    kernel = kernels[found[2]]
    arguments = flat(text[found.end() - 1 : match_bracket(masked, found.end() - 1)])
    function = flat(found[1]) + arguments
    threads = attribute(text, masked, head.attributes, "max_total_threads_per_threadgroup")
    if not threads and kernel.threads:
        threads = re.sub(r"(\w+)$", r"mfa_sim_threads_\1", flat(found[1])) + arguments + "::value"
    name = attribute(text, masked, head.attributes, "host_name")
    if not name:
        raise fail(text, head.start, "a kernel instantiation needs a host_name")
    return head.start, end + 1, registration(kernel, function, name, threads, number)


def rewrite_kernels(text: str) -> str:
    masked = mask(text)
    templates = {match_bracket(masked, m.end() - 1): m.start() for m in re.finditer(r"\btemplate\s*<", masked)}
    kernels: dict[str, Kernel] = {}
    edits: list[Edit] = []
    done = 0
    words = re.finditer(r"\[\[(?=[^\[\]]*\bkernel\b)[^\[\]]*\]\]|\bkernel\b", masked)
    for number, word in enumerate(words):
        if word.start() < done:
            continue
        head = read_head(masked, *word.span(), templates)
        done = head.end
        if head.kind == "instantiation":
            edits.append(read_instantiation(text, masked, head, kernels, number))
            continue
        kernel, own, end = read_definition(text, masked, head)
        kernels[kernel.name] = kernel
        edits += own
        if head.kind == "template" and kernel.threads:
            value = f"static constexpr int value = ({kernel.threads});"
            edits.append(
                (head.start, head.start, f"{flat(head.template)} struct mfa_sim_threads_{kernel.name} {{ {value} }}; ")
            )
        if head.kind == "plain" and end > head.start:
            name = attribute(text, masked, head.attributes, "host_name") or quoted(kernel.name)
            edits.append((end, end, " " + registration(kernel, kernel.name, name, kernel.threads, number)))
        done = max(done, end)
    return apply(text, edits)


# ---- everything else


def rewrite_pragmas(text: str) -> str:
    """`#pragma unroll(anything but a number)` loses its argument: no macro is expanded there."""
    text = re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+METAL\b.*$", "", text, flags=re.M)
    return re.sub(
        r"^([ \t]*#[ \t]*pragma[ \t]+unroll)\b(?![ \t]*\(?[ \t]*\d+[ \t]*\)?[ \t]*$).*$", r"\1", text, flags=re.M
    )


def rewrite_attributes(text: str) -> str:
    """[[threadgroup(i)]] on what is no kernel: the word is a macro by the time that clang reads it."""
    edits = [(*found.span(), "") for found in re.finditer(r"\[\[\s*threadgroup\s*\([^()]*\)\s*\]\]", mask(text))]
    return apply(text, edits)


def rewrite_function_constants(text: str) -> str:
    """`constant T x [[function_constant(i)]];`, and constants computed from those, -> objects that read like a T."""
    masked = mask(text)
    edits: list[Edit] = []
    names: list[str] = []
    pattern = (
        r"\b(?:static\s+)?constant\s+(?:const\s+|constexpr\s+)*([\w:]+)\s+(\w+)\s*(?:\[\[\s*function_constant\s*(\()|=)"
    )
    for found in re.finditer(pattern, masked):
        type_, name = found[1], found[2]
        end = masked.index(";", found.end())
        if found[3]:
            index = flat(text[found.end() : match_bracket(masked, found.end() - 1) - 1])
            arguments = f"<{type_}, ({index})>"
            code = (
                f"static constexpr ::mfa_sim::FunctionConstant{arguments} {name}{{}}; "
                f"static const ::mfa_sim::ConstantRegistration{arguments} mfa_sim_constant_{name}"
                f"({quoted(name)}, {quoted(type_)});"
            )
        elif any(re.search(rf"\b{other}\b", masked[found.end() : end]) for other in names):
            value = flat(text[found.end() : end])
            code = (
                f"struct mfa_sim_derived_{name} {{ MFA_SIM_INLINE operator {type_}() const {{ return {value}; }} }}; "
                f"static constexpr mfa_sim_derived_{name} {name}{{}};"
            )
        else:
            continue
        names.append(name)
        edits.append((found.start(), end + 1, code))
    return apply(text, edits)


def rewrite_array_parameters(text: str) -> str:
    """`constant T x[N]` as a parameter -> `constant T* x`: arrays in an address space do not decay."""
    pattern = (
        r"(?<=[(,])(\s*(?:const\s+)?(?:device|constant|threadgroup)\b[^()\[\],;={}]*?)(\w+)\s*\[[^\[\]]*\](?=\s*[,)])"
    )
    edits = [(m.end(1), m.end(), f"* {m[2]}") for m in re.finditer(pattern, mask(text))]
    return apply(text, edits)


def rewrite_casts(text: str) -> str:
    """C-style casts to pointers with an address space, and to vectors."""
    masked = mask(text)
    edits: list[Edit] = []
    pattern = rf"\(\s*((?:metal\s*::\s*)?{VECTOR}|[\w\s:<>,]+\*(?:\s*const)?)\s*\)(?=\s*(?:[\w(\"]|&(?!&)|\*))"
    for found in re.finditer(pattern, masked):
        if "*" in found[1] and not re.search(r"\b(?:device|constant|threadgroup|thread)\b", found[1]):
            continue
        before = re.search(r"([\w>\])]+)\s*$", masked[max(0, found.start() - 64) : found.start()])
        if before is None or re.search(r"\b(?:return|case|else)$", before[1]):
            edits.append((found.start(), found.end(), f"::mfa_sim::cast<{flat(found[1])}>{{}} ->* "))
    return apply(text, edits)


def rewrite_constructors(text: str) -> str:
    """`float4(..)`, `vec<T, 4>(..)` and static_cast to them -> mfa_sim::construct."""
    masked = mask(text)
    edits: list[Edit] = []
    for found in re.finditer(rf"(?<![\w:])(?:metal\s*::\s*)?(?:{VECTOR}\b|vec\s*(<))", masked):
        end = match_bracket(masked, found.end() - 1) if found[1] else found.end()
        behind = re.compile(r"\s*\((?!\s*&)|\s*>\s*\(").match(masked, end)
        before = masked[max(0, found.start() - 32) : found.start()]
        if behind is None or re.search(r"\boperator\s*$", before):
            continue
        if ">" in behind[0]:
            if static := re.search(r"\bstatic_cast\s*<\s*(?:typename\s+)?$", before):
                edits.append((found.start() - len(static[0]), found.start(), "::mfa_sim::construct<"))
        else:
            edits += [(found.start(), found.start(), "::mfa_sim::construct<"), (end, end, ">")]
    return apply(text, edits)


def rewrite(text: str) -> str:
    """All steps, on the output of clang -E."""
    text = rewrite_pragmas(text)
    text = rewrite_kernels(text)
    text = rewrite_attributes(text)
    text = rewrite_function_constants(text)
    text = rewrite_array_parameters(text)
    text = rewrite_casts(text)
    return rewrite_constructors(text)
