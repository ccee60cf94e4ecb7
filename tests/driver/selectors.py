"""Selectors and signatures of metal-cpp's headers, to compare with what the driver implements."""

import re
from collections import defaultdict
from pathlib import Path

# Codes as in csrc/simulator/driver/runtime.h.
_SCALARS = {
    "void": "v", "bool": "B", "double": "d", "float": "f", "CFTimeInterval": "d", "NS::TimeInterval": "d",
    "NS::UInteger": "u64", "UInteger": "u64", "NS::Integer": "i64", "Integer": "i64", "uint64_t": "u64",
    "unsigned long long": "u64", "uint32_t": "u32", "int": "i32", "unichar": "u16", "MTL::Size": "{24}", "Size": "{24}",
    "NS::Range": "{16}", "Range": "{16}",
    "OperatingSystemVersion": "{24}", "GPUAddress": "u64", "MTL::GPUAddress": "u64", "dispatch_data_t": "p", "SEL": "p",
    "StringEncoding": "u64", "ErrorDomain": "p", "_Object*": "p",
}  # fmt: skip


def _code(declared: str, enums: dict[str, str]) -> str:
    text = re.sub(r"\b(const|class|struct)\b", "", declared).strip()
    if "*" in text or "[" in text or "^" in text or text.endswith(("Handler", "HandlerFunction", "Block")):
        return "p"
    text = text.removesuffix("&").strip()
    return _SCALARS.get(text) or enums.get(text.split("::")[-1]) or f"?{text}"


def _parameter_type(parameter: str) -> str:
    return parameter if "^" in parameter else re.sub(r"\s*\b\w+\s*(\[\])?$", r"\1", parameter.strip())


def signatures(metal_cpp: Path) -> dict[str, set[str]]:
    """Selector -> the signatures with which metal-cpp sends it, "result:argument,argument,"."""
    text = "".join(
        path.read_text() for folder in ("Foundation", "Metal") for path in sorted((metal_cpp / folder).glob("*.hpp"))
    )
    accessors = dict(re.findall(r"_DEF_SEL\(\s*(\w+),\s*\"([^\"]+)\"\s*\)", text))
    enums = {
        name: _SCALARS[base]
        for base, name in re.findall(r"_(?:NS|MTL)_(?:ENUM|OPTIONS)\(([\w:]+), (\w+)\)", text)
        if base in _SCALARS
    }
    sent = defaultdict(set)
    pattern = re.compile(
        r"_(?:NS|MTL)_INLINE [^;{}]*?\(([^{};]*)\)(?: const)?\s*\{\s*(?:return )?"
        r"(?:NS::)?(?:Object::)?(sendMessage(?:Safe)?<([^;]*?)>|alloc<[^;]*?>|init<[^;]*?>)\(([^;]*)\);"
    )
    for parameters, _, result, arguments in pattern.findall(text):
        accessor = re.search(r"_PRIVATE_SEL\((\w+)\)", arguments)
        if accessor is None or not result or accessor[1] not in accessors:
            continue
        codes = [_code(_parameter_type(p), enums) for p in re.split(r",(?![^()]*\))", parameters) if p.strip()]
        if arguments.startswith("pObj,"):  # a static helper: the first parameter is the receiver
            codes = codes[1:]
        sent[accessors[accessor[1]]].add(f"{_code(result, enums)}:{''.join(code + ',' for code in codes)}")
    for selector in accessors.values():
        sent[selector]  # known, though perhaps never sent
    return dict(sent)
