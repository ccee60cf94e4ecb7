"""What every file in metal/ keeps, read from its text and from the IR that a compiler makes of it."""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from plan_problems import CATALOGUE, METAL

sys.path.insert(0, str(METAL.parent / "csrc" / "simulator"))
import instructions
import translate
from rewrite import rewrite

SOURCES = sorted(METAL.rglob("*.metal"))
# One of each kind that multiplies; both ways to hold Q, sums in parts (f32), a half set at the end (80).
INSTANCES = {
    "FORWARD(f16, staged, split, 64, 64, 8, 2, 32)": "forward.h",
    "FORWARD(f32, staged, shared, 256, 256, 2, 1, 8)": "forward.h",
    "FORWARD(bf16, direct, split, 80, 80, 4, 1, 32)": "forward.h",
    "DECODE(f16, direct, 128, 128, 1, 1, 32)": "decode.h",
    "DECODE(f16, staged, 128, 128, 8, 1, 32)": "decode.h",
    "BACKWARD_DKDV(bf16, staged, 64, 64, 4, 2, 16)": "backward_dkdv.h",
    "BACKWARD_DKDV(f32, staged, 80, 80, 4, 1, 8)": "backward_dkdv.h",
    "BACKWARD_DQ(f16, staged, held, 80, 80, 4, 1, 32)": "backward_dq.h",
    "BACKWARD_DQ_FROM_DS(f16, 64, 4, 4, 32)": "backward_dq_from_ds.h",
    "BACKWARD_DBIAS(f16, staged, 64, 64, 4, 32)": "backward_dbias.h",
}


def standard_of(source: Path) -> str:
    return "metal4.0" if source.parent.name == "unit" else "metal3.1"


def preprocessed(source: Path) -> str:
    with tempfile.TemporaryDirectory() as directory:
        flags = [f"-D{name}" for name in translate.PREDEFINED]
        return translate.preprocess(source, directory, flags, None, source, standard_of(source))


def host_names(source: Path) -> list[str]:
    found = re.findall(r'host_name\(((?:\s*"[^"]*")+)\s*\)', preprocessed(source))
    return ["".join(re.findall(r'"([^"]*)"', name)) for name in found]


@pytest.mark.simulator
def test_every_kernel_of_the_catalogue_is_instantiated_once() -> None:
    names = Counter(name for source in SOURCES for name in host_names(source))
    assert names == Counter(list(CATALOGUE))


def unoptimised(source: Path) -> str:
    """LLVM IR before any pass: what the source asks for, whatever a compiler then makes of it."""
    with tempfile.TemporaryDirectory() as directory:
        file, output = Path(directory) / "translated.cc", Path(directory) / "kernel.ll"
        file.write_text(rewrite(preprocessed(source)))
        shim = ["-isystem", str(translate.MSL / "freestanding"), "-include", str(translate.MSL / "shim.h")]
        flags = ["-w", "-O2", "-DMFA_SIM_FAST", "-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"]
        language = translate.of_standard(translate.LANGUAGE, standard_of(source))
        flags += ["-DMFA_SIM_UNIT_LAYOUT=10"] if standard_of(source) == "metal4.0" else []
        translate.run([*translate.compiler(), *language, *shim, *flags, str(file), "-o", str(output)])
        return output.read_text()


@pytest.mark.simulator
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(METAL).with_suffix("")))
def test_matrices_exist_only_around_a_product(source: Path) -> None:
    """Metal's own types are never members, and variables only in one product, or what it calls."""
    ir = unoptimised(source)
    types = re.findall(r"^(%.*) = type .*(?:simdgroup_matrix|cooperative_tensor)", ir, re.MULTILINE)
    assert types == []
    own = r'%"(struct|class)\.metal::(simdgroup_matrix|cooperative_tensor)'
    products = ("multiply_add", "simdgroup_multiply", "multiply_tiles", "mpp")
    for name, body in re.findall(r"^define [^@]*@(\w+)\((.*?)^\}", ir, re.MULTILINE | re.DOTALL):
        matrices = re.findall(r"= alloca (.*(?:simdgroup_matrix|cooperative_tensor)[^,]*)", body)
        assert all(re.match(own, one) for one in matrices), name
        assert not matrices or any(product in name for product in products), name


@pytest.mark.simulator
@pytest.mark.parametrize(("row", "header"), INSTANCES.items(), ids=lambda text: text.replace(" ", ""))
def test_nothing_is_left_in_memory(row: str, header: str) -> None:
    """Every loop over fragments is unrolled, so each is a register; with no function constant on, and with those that
    make an instance fastest."""
    assert row in (METAL / "instances.def").read_text()
    for constants in ([], ["is_aligned", "is_exact_head", "wants_grad_key", "wants_grad_value"]):
        ir = instructions.emit(f'#include "{header}"\nnamespace mfa {{\n{row}\n}}\n', [METAL], constants)
        kernel = instructions.kernel_of(ir)
        kept = [i.text for block in kernel.blocks.values() for i in block if i.opcode == "alloca"]
        assert kept == [], constants


def test_loops_are_unrolled_by_the_macro() -> None:
    for file in (file for file in METAL.rglob("*") if file.is_file()):
        assert not re.search(r"^\s*#\s*pragma\s+unroll", file.read_text(), re.MULTILINE), file.name
