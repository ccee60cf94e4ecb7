"""What one step of a kernel's main loop costs before Apple's compiler sees it: read from clang's optimised LLVM IR.

The kernel is compiled with its function constants fixed, everything inlined and every loop of known length unrolled; an
MMA, a shuffle or a reduction is one opaque instruction. Counted are the blocks that every step runs, the cheaper arm of
an `if` with an `else`, and what moves data: what is left out are the exceptions, masks and rescales.

Registers are the most data that is alive at once in the loop, in 32 bits (two halves share one). What addresses and
counters take besides differs between compilers for x86 and for a GPU: `make agx-check` compiles for one.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import translate
from rewrite import rewrite

OPTIONS = (
    "-O2 -DMFA_SIM_FAST -DMFA_SIM_STATIC -fno-vectorize -fno-slp-vectorize -mllvm -inline-threshold=1000000 "
    "-mllvm -inlinehint-threshold=1000000 -mllvm -unroll-threshold=100000 -mllvm -unroll-max-count=4096 "
    "-mllvm -indvars-widen-indvars=false"
)
HALF_REGISTERS = {"half": 1, "bfloat": 1, "float": 2, "double": 4}  # of data
# Instructions that name a part of a value, or none at all.
FREE = {"phi", "ret", "extractelement", "insertelement", "shufflevector", "extractvalue", "insertvalue", "bitcast"}
CONVERSIONS = {"fptrunc", "fpext", "sitofp", "uitofp", "fptosi", "fptoui"}
VALUE = r"(<[^<>]*>|[^\s,]+)"  # an operand: of a vector's constant, all of it
# What it takes to bring one of two elements from elsewhere beside the other, in one of two operands that come from the
# same two vectors: three instructions swap two elements. Listings of Mesa's AGX backend have as many.
MOVES_PER_OPERAND = 1.5
PRODUCTS = ("mma", "mixed_mma", "wide_mma", "unit_mma")
FLOATS = {"fadd", "fsub", "fmul", "fdiv", "fneg", "fcmp"}


@dataclass(frozen=True)
class Instruction:
    result: str | None
    opcode: str
    text: str
    operands: tuple[str, ...]


class Function:
    """A function of an LLVM module: blocks, dominators, loops."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.blocks: dict[str, list[Instruction]] = {}
        arguments = re.findall(r"%(\d+)[,)]", lines[0])
        self.arguments = arguments
        name = str(max(map(int, arguments), default=-1) + 1)
        self.blocks[name] = []
        for line in lines[1:]:
            if label := re.match(r"(\d+):", line):
                name = label[1]
                self.blocks[name] = []
            elif line.startswith("  "):
                self.blocks[name].append(parse(line.strip()))
        self.entry = next(iter(self.blocks))

    @cached_property
    def successors(self) -> dict[str, list[str]]:
        return {name: re.findall(r"label %(\d+)", block[-1].text) for name, block in self.blocks.items()}

    @cached_property
    def order(self) -> list[str]:
        """Blocks that are reached, dominators first (reverse postorder)."""
        seen, done, todo = {self.entry}, [], [(self.entry, iter(self.successors[self.entry]))]
        while todo:
            targets = todo[-1][1]
            target = next((t for t in targets if t not in seen), None)
            if target is None:
                done.append(todo.pop()[0])
            else:
                seen.add(target)
                todo.append((target, iter(self.successors[target])))
        return done[::-1]

    @cached_property
    def predecessors(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in self.blocks}
        for name, targets in self.successors.items():
            for target in targets:
                found[target].append(name)
        return found

    @cached_property
    def dominators(self) -> dict[str, set[str]]:
        everything = set(self.blocks)
        found = dict.fromkeys(self.blocks, everything)
        found[self.entry] = {self.entry}
        changed = True
        while changed:
            changed = False
            for name in self.order[1:]:
                new = {name} | set.intersection(*(found[above] for above in self.predecessors[name]))
                if new != found[name]:
                    found[name], changed = new, True
        return found

    def reaches(self, start: str, end: str, without: str, inside: set[str]) -> bool:
        """Whether a path inside some blocks, that avoids one of them, leads from start to end."""
        if without in (start, end):
            return False
        seen, todo = {start}, [start]
        while todo:
            for target in self.successors[todo.pop()]:
                if target in inside and target != without and target not in seen:
                    seen.add(target)
                    todo.append(target)
        return end in seen

    def loops(self) -> list[tuple[str, set[str]]]:
        """(latch, blocks) of each back edge."""
        loops = []
        for latch, targets in self.successors.items():
            for header in targets:
                if header in self.dominators[latch]:
                    body, todo = {header}, [latch]
                    while todo:
                        name = todo.pop()
                        if name not in body:
                            body.add(name)
                            todo += self.predecessors[name]
                    loops.append((latch, body))
        return loops


def parse(line: str) -> Instruction:
    line = re.sub(r", ![a-z.]+ !\d+", "", line)
    result, text = line.split(" = ", 1) if re.match(r"%\d+ = ", line) else (None, line)
    opcode = re.sub(r"^(tail |musttail |notail )", "", text).split()[0]
    return Instruction(result and result[1:], opcode, text, tuple(re.findall(r"%(\d+)\b", text)))


def result_type(instruction: Instruction) -> list[str]:
    """The scalar types of what an instruction yields."""
    text = instruction.text
    if instruction.opcode in ("icmp", "fcmp"):
        count = re.search(r"<(\d+) x", text)
        return ["i1"] * (int(count[1]) if count else 1)
    if instruction.opcode == "getelementptr" or instruction.opcode == "alloca":
        return ["ptr"]
    if instruction.opcode in (*CONVERSIONS, "zext", "sext", "trunc", "bitcast", "ptrtoint", "inttoptr"):
        text = text.rsplit(" to ", 1)[1]
    elif instruction.opcode == "select":
        text = text.split(", ")[1] if "<" not in text.split(",")[0] else text.split("> ", 1)[1]
    return types_of(text)


def types_of(text: str) -> list[str]:
    scalar = r"(i\d+|half|bfloat|float|double|ptr)\b"
    if struct := re.search(r"\{ ([^}]*) \}", text.split("(")[0]):
        return [kind for part in struct[1].split(", ") for kind in types_of(part)]
    found = re.search(rf"<(\d+) x {scalar}>|{scalar}", text)
    if not found:
        return []
    return [found[2]] * int(found[1]) if found[1] else [found[3]]


def classify(instruction: Instruction) -> tuple[str, int]:
    """The kind of an instruction, and how many scalar ones it stands for."""
    opcode, text = instruction.opcode, instruction.text
    if opcode in FREE:
        return "free", 0
    if opcode in ("br", "switch"):
        return ("integer", 1) if " i1 " in text else ("free", 0)
    if opcode == "call":
        if " asm " in text:
            kind = opaque(text)
            return kind, int(re.findall(r" i32 (\d+)", text)[0]) if kind == "unit_mma" else 1
        name = re.search(r"@([\w.]+)\(", text)
        callee = name[1] if name else ""
        if "barrier" in callee:
            return "barrier", 1
        if callee.startswith(("llvm.lifetime", "llvm.memset", "llvm.assume", "llvm.experimental")):
            return "free", 0
        width = max(1, len(types_of(text)))
        if callee.startswith(("llvm.exp", "llvm.log", "llvm.sqrt")):
            return "exp", width
        return ("arithmetic" if re.search(r"\.v?\d*(f16|f32|bf16)$", callee) else "integer"), width
    if opcode in ("load", "store"):
        return opcode, 1
    width = max(1, len(result_type(instruction)))
    if opcode in CONVERSIONS:
        return "conversion", width
    if opcode in FLOATS or (opcode == "select" and re.search(r"\b(float|half|bfloat)\b", text)):
        return "arithmetic", width
    if opcode == "getelementptr":  # constant offsets are part of the access
        return ("integer", 1) if len(instruction.operands) > 1 else ("free", 0)
    return "integer", width


def opaque(text: str) -> str:
    """mma (both operands of 16 bits), mixed_mma, wide_mma (both of 32), unit_mma, shuffle, reduce or vote."""
    name, inputs = re.search(r'asm (?:sideeffect )?"(\w+)[^"]*", "[^"]*"\((.*)\)', text).groups()  # type: ignore[union-attr]
    if name != "mma":
        return str(name)
    left, right = (inputs.split(", ")[i].startswith("float") for i in (0, 2))
    return "wide_mma" if left and right else "mixed_mma" if left or right else "mma"


def is_offset(instruction: Instruction) -> bool:
    """Whether the value is another plus a constant."""
    if instruction.opcode == "getelementptr":
        return len(instruction.operands) == 1
    return instruction.opcode in ("add", "or", "zext", "sext", "trunc", "freeze") and len(instruction.operands) == 1


@dataclass(frozen=True)
class Step:
    """One step of the main loop, per SIMD-group."""

    # mma, mixed_mma, wide_mma, unit_mma, shuffle, reduce, vote, exp, arithmetic, integer, conversion, move, load, ...
    counts: Mapping[str, int]
    exceptions: int  # instructions that were left out
    registers: int  # 32-bit, per lane, of data


def main_loop(function: Function) -> tuple[str, set[str]]:
    """The latch and the blocks of the smallest loop that multiplies; in a kernel for the matrix unit, where that may be
    a loop over the head dimension, of the smallest that exponentiates."""
    kinds = ("exp",) if uses_unit(function) else PRODUCTS
    wanted = {name for name, block in function.blocks.items() for i in block if classify(i)[0] in kinds}
    return min((loop for loop in function.loops() if loop[1] & wanted), key=lambda loop: len(loop[1]))


def uses_unit(function: Function) -> bool:
    return any(classify(i)[0] == "unit_mma" for block in function.blocks.values() for i in block)


def usual_blocks(function: Function, latch: str, body: set[str]) -> dict[str, int]:
    """Those that every step runs, and how often. In a kernel for the matrix unit, which moves maxima and makes up for
    the rounding of P in blocks of their own, those of the cheapest step."""
    header = next(name for name in function.order if name in body)
    kinds = {name: [classify(i) for i in function.blocks[name]] for name in body}
    if uses_unit(function):
        inner = [loop for loop in function.loops() if loop[1] < body]
        times = {
            name: math.prod(trips(function, inner_latch) for inner_latch, blocks in inner if name in blocks)
            for name in body
        }
        costs = {name: times[name] * sum(width for _, width in kinds[name]) for name in body}
        exponentiating = [name for name in body if any(kind == "exp" for kind, _ in kinds[name])]
        ways = [
            cheapest_way(function, header, name, costs) | cheapest_way(function, name, latch, costs)
            for name in exponentiating
        ]
        return {name: times[name] for name in min(ways, key=lambda way: sum(costs[name] for name in way))}
    usual = usual_arms(function, kinds)
    multiplying = [name for name in body if any(map(is_product, function.blocks[name]))]
    return {
        name: 1
        for name in body
        # Between two products, or between a product and the ends of the loop, there is no way round it.
        if any(
            not function.reaches(start, end, without=name, inside=body)
            for product in multiplying
            for start, end in ((header, product), (product, latch))
        )
        or any(moves_data(i) for i in function.blocks[name])
        or name in usual
    }


def cheapest_way(function: Function, start: str, end: str, costs: Mapping[str, int]) -> set[str]:
    """Blocks, of those that have a cost, on a way that doesn't go back."""
    order = [name for name in function.order if name in costs]
    order = order[order.index(start) : order.index(end) + 1]
    least: dict[str, float] = {start: 0}
    before: dict[str, str] = {}
    for place, name in enumerate(order):
        for target in function.successors[name]:
            cost = least.get(name, math.inf) + costs.get(target, math.inf)
            if target in order[place + 1 :] and cost < least.get(target, math.inf):
                least[target], before[target] = cost, name
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return set(way)


def trips(function: Function, latch: str) -> int:
    """How often a loop runs that counts from a constant to another one."""
    of = {i.result: i for block in function.blocks.values() for i in block if i.result}
    condition = of[function.blocks[latch][-1].operands[0]]
    if condition.text.startswith("phi i1"):  # whether this is the first time
        return 2
    tested, end = re.fullmatch(r"icmp (?:eq|(?:samesign )?ult) \w+ %(\d+), (\d+)", condition.text).groups()  # type: ignore[union-attr]
    is_counter = of[tested].opcode == "phi"  # before it grows, for the last time when it has reached the end
    last = re.search(r"\[ %(\d+), ", of[tested].text)[1] if is_counter else tested  # type: ignore[index]
    counter, step = re.fullmatch(r"add (?:nuw |nsw )*\w+ %(\d+), (\d+)", of[last].text).groups()  # type: ignore[union-attr]
    (start,) = re.search(r"\[ (\d+), ", of[counter].text).groups()  # type: ignore[union-attr]
    return (int(end) - int(start)) // int(step) + is_counter


def step_of(function: Function) -> Step:
    latch, body = main_loop(function)
    usual = usual_blocks(function, latch, body)
    counts: Counter[str] = Counter()
    counted = []
    for name, times in usual.items():
        for instruction in function.blocks[name]:
            kind, width = classify(instruction)
            counts[kind] += times * width
        counts["load"] -= times * merged_loads(function.blocks[name], 4 if uses_unit(function) else 2)
        counted += function.blocks[name]
    exceptions = sum(classify(i)[1] for name in body - usual.keys() for i in function.blocks[name])
    atoms = Atoms(function)
    counts["move"] = math.ceil(MOVES_PER_OPERAND * len(assembled_operands(counted, atoms)))
    del counts["free"]
    return Step(counts, exceptions, -(-most_alive(function, body, atoms) // 2))


def usual_arms(function: Function, kinds: Mapping[str, list[tuple[str, int]]]) -> set[str]:
    """Of each `if` with an `else`, the arm that costs less: the other one is the exception."""
    usual = set()
    for name in kinds:
        arms = [arm for arm in function.successors[name] if function.predecessors[arm] == [name]]
        if len(arms) == 2 and function.successors[arms[0]] == function.successors[arms[1]]:
            usual.add(min(arms, key=lambda arm: sum(width for _, width in kinds.get(arm, []))))
    return usual


def is_product(instruction: Instruction) -> bool:
    return classify(instruction)[0] in PRODUCTS


def moves_data(instruction: Instruction) -> bool:
    """Whether it multiplies, stores, waits, or loads elements of a tensor (other loads are of parameters)."""
    kind, _ = classify(instruction)
    return (
        is_product(instruction)
        or kind in ("store", "barrier")
        or bool(re.match(r"load (half|bfloat|<(?!1 x))", instruction.text))
    )


def merged_loads(block: Sequence[Instruction], most: int) -> int:
    """How many 16-bit loads share one with their neighbours, `most` of them in all."""
    roots: dict[str, tuple[str, int]] = {}
    places: set[tuple[str, int]] = set()
    for instruction in block:
        operands = instruction.operands
        offset = re.fullmatch(r"getelementptr.* (i8|half|bfloat|i16), ptr %\d+, i64 (-?\d+)", instruction.text)
        if offset and instruction.result:
            root, start = roots.get(operands[0], (operands[0], 0))
            roots[instruction.result] = root, start + int(offset[2]) * (1 if offset[1] == "i8" else 2)
        elif re.match(r"load (half|bfloat|i16),", instruction.text):
            places.add(roots.get(operands[0], (operands[0], 0)))
    merged = 0
    for root, start in sorted(places):
        if (root, start) in places:
            length = next(i for i in range(1, most + 1) if i == most or (root, start + 2 * i) not in places)
            places -= {(root, start + 2 * i) for i in range(length)}
            merged += length - 1
    return merged


def assembled_operands(block: Iterable[Instruction], atoms: Atoms) -> set[tuple[str, str]]:
    """Pairs of elements that a product takes from one register, or from two in a row, and that no load put there."""
    found = set()
    for instruction in block:
        if not is_product(instruction):
            continue
        inputs = re.findall(r"(?:half|bfloat|float) %(\d+)", instruction.text.rsplit("(", 1)[1])
        elements = [atoms.of[name][0] for name in inputs[:4]]  # of A and of B
        for first, second in zip(elements[::2], elements[1::2], strict=True):
            if first in atoms.loaded and second in atoms.loaded and not are_neighbours(first, second):
                found.add((first, second))
    return found


def are_neighbours(first: str, second: str) -> bool:
    """Whether they are halves of a word, or an even element of a vector and the next one."""
    (vector, index), (other, next_index) = first.split("."), second.split(".")
    return first == second or (vector == other and int(index) % 2 == 0 and int(next_index) == int(index) + 1)


def most_alive(function: Function, body: set[str], atoms: Atoms) -> int:
    """In half-registers, of any point of the loop."""
    live_in: dict[str, set[str]] = {name: set() for name in function.blocks}
    most = 0
    changed = True
    while changed:
        changed, most = False, 0
        for name in reversed(function.order):
            alive: set[str] = set()
            for successor in function.successors[name]:
                alive |= live_in[successor] | atoms.phi_uses.get((successor, name), set())
            for instruction in reversed(function.blocks[name]):
                alive -= set(atoms.defined(instruction))
                if instruction.opcode != "phi":
                    alive |= atoms.used(instruction)
                if name in body:
                    most = max(most, sum(atoms.size[atom] for atom in alive))
            if alive != live_in[name]:
                live_in[name], changed = alive, True
    return most


class Atoms:
    """Scalars that need a register: vectors taken apart, parts and offsets of others left out."""

    def __init__(self, function: Function) -> None:
        self.size: dict[str, int] = {}
        self.loaded: set[str | None] = set()  # those that a load of a vector yields
        self.of: dict[str, list[str | None]] = {}  # value -> its scalars; None for a constant
        self.phi_uses: dict[tuple[str, str], set[str]] = {}
        for argument in function.arguments:
            self.of[argument] = []  # buffers' addresses lie in uniform registers
        phis = []
        for name, block in function.blocks.items():
            for instruction in block:
                if instruction.opcode == "phi":
                    phis.append((name, instruction))
                    self._define(instruction)
        for name in function.order:
            for instruction in function.blocks[name]:
                if instruction.result and instruction.opcode != "phi":
                    self.of[instruction.result] = self._scalars(instruction)
        for name, phi in phis:
            for value, source in re.findall(r"\[ ([^,\]]+), %(\d+) \]", phi.text):
                if value.startswith("%"):
                    used = {atom for atom in self.of[value[1:]] if atom}
                    self.phi_uses.setdefault((name, source), set()).update(used)

    def _define(self, instruction: Instruction) -> list[str | None]:
        result = instruction.result
        assert result is not None
        names = [f"{result}.{i}" for i in range(len(result_type(instruction)))]
        for name, kind in zip(names, result_type(instruction), strict=True):
            self.size[name] = HALF_REGISTERS.get(kind, 0)
        self.of[result] = list(names)
        if instruction.opcode == "load" and len(names) > 1:
            self.loaded.update(names)
        return self.of[result]

    def _scalars(self, instruction: Instruction) -> list[str | None]:
        opcode, text = instruction.opcode, instruction.text
        operands = [self.of.get(name, []) for name in instruction.operands]
        if opcode in ("extractelement", "extractvalue") and operands:
            index = int(text.rsplit(" ", 1)[1]) if re.search(r" \d+$", text) else 0
            struct = re.match(r"extractvalue \{ ([^}]*) \}", text)
            width = len(types_of(struct[1].split(", ")[index])) if struct else 1
            return operands[0][index * width : (index + 1) * width]  # the fields of a struct are alike
        if opcode == "insertelement" and re.search(r" \d+$", text):
            width, index = len(result_type(instruction)), int(text.rsplit(" ", 1)[1])
            vector, scalar = re.match(rf"insertelement <[^>]+> {VALUE}, \S+ {VALUE},", text).groups()  # type: ignore[union-attr]
            result: list[str | None] = list(self.of[vector[1:]]) if vector.startswith("%") else [None] * width
            result[index] = self.of[scalar[1:]][0] if scalar.startswith("%") else None
            return result
        if opcode == "shufflevector":
            vectors = rf"shufflevector <(\d+) x [^>]+> {VALUE}, <\d+ x [^>]+> {VALUE}, <(\d+) x i32> (.*)"
            sources = re.match(vectors, text)
            assert sources is not None
            width = int(sources[1])
            pool: list[str | None] = []
            for value in (sources[2], sources[3]):
                pool += self.of[value[1:]] if value.startswith("%") else [None] * width
            if "zeroinit" in sources[5]:
                return [pool[0]] * int(sources[4])
            mask = re.findall(r"i32 (\d+|poison|undef)", sources[5])
            return [pool[int(i)] if i.isdigit() else None for i in mask]
        if (opcode == "bitcast" or is_offset(instruction)) and operands:
            source = operands[0]
            width = len(result_type(instruction))
            return [source[i * len(source) // width] for i in range(width)] if source else []
        return self._define(instruction)

    def defined(self, instruction: Instruction) -> list[str]:
        if instruction.result is None:
            return []
        return [atom for atom in self.of[instruction.result] if atom and atom.split(".")[0] == instruction.result]

    def used(self, instruction: Instruction) -> set[str]:
        if not instruction.result or self.defined(instruction):
            return {atom for name in instruction.operands for atom in self.of.get(name, []) if atom}
        return set()


def emit(
    source: str,
    include_dirs: Sequence[str | Path],
    constants: Iterable[str],
    flat: bool = False,
    standard: str = "metal3.1",
) -> str:
    """LLVM IR of MSL text; function constants named in `constants` are true, the others false."""
    true = set(constants)
    flags = [f"-D{name}" for name in translate.PREDEFINED] + [f"-I{path}" for path in include_dirs]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.metal"
        file.write_text(source)
        text = rewrite(translate.preprocess(file, directory, flags, None, file, standard))
        text = re.sub(
            r"static constexpr ::mfa_sim::FunctionConstant<(\w+), [^;]*> (\w+)\{\};",
            lambda match: f"static constexpr {match[1]} {match[2]} = {'true' if match[2] in true else 'false'};",
            text,
        )
        translated, output = Path(directory) / "translated.cc", Path(directory) / "kernel.ll"
        translated.write_text(text)
        shim = ["-isystem", str(translate.MSL / "freestanding"), "-include", str(translate.MSL / "shim.h")]
        shim += ["-DMFA_SIM_FLAT"] if flat else []
        shim += ["-DMFA_SIM_UNIT_LAYOUT=10"] if standard == "metal4.0" else []
        language = translate.of_standard(translate.LANGUAGE, standard)
        command = [*translate.compiler(), *language, "-march=x86-64-v3", *OPTIONS.split(), *shim]
        translate.run([*command, str(translated), "-S", "-emit-llvm", "-o", str(output)])
        return output.read_text()


def kernel_of(module: str) -> Function:
    """The function of a module that multiplies matrices most."""
    functions = [text.splitlines() for text in re.findall(r"^define .*?^\}", module, re.DOTALL | re.MULTILINE)]
    return Function(max(functions, key=lambda lines: len(re.findall(r'asm "(?:unit_)?mma', "".join(lines)))))
