"""What is measured: every instance of metal/instances.def with the function constants of a plain problem."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from gpu_check.plans import enumerators

from mfa import _native

from .emit import ROOT, Pipeline

METAL = ROOT / "metal"
HERE = Path(__file__).parent
CONSTANTS = enumerators("FunctionConstant")
PLAIN = ("aligned", "exact_head")
# Pipelines of a kind that a plain problem may launch. backward_dkdv of five GEMMs writes dS too; above D + Dv 256, on
# the matrix unit 128, dK and dV come from launches of their own, but of a team. The unit has seven GEMMs.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "forward": {"": ("writes_lse",)},
    "decode": {"": ("writes_lse",), "split": ("is_split",)},
    "combine": {"": ("writes_lse",)},
    "backward_dkdv": {
        "": ("wants_grad_key", "wants_grad_value"),
        "ds": ("wants_grad_key", "wants_grad_value", "writes_score_gradient"),
    },
}
APART: dict[str, tuple[str, ...]] = {
    "dk": ("wants_grad_key",),
    "dk/ds": ("wants_grad_key", "writes_score_gradient"),
    "dv": ("wants_grad_value",),
}
LARGEST_PAIR, LARGEST_UNIT_PAIR = 256, 128


def family_of(instance: _native.Instance) -> str:
    """The name of the header in metal/ that has the kernel."""
    if is_on_unit(instance):
        return f"unit/{instance.kind}{instance.path.removeprefix('unit')}"
    if instance.path == "team" and instance.kind.startswith("backward"):
        return f"{instance.kind}_team"
    return "tile_map" if instance.kind.startswith("tile_map") else instance.kind


def is_on_unit(instance: _native.Instance) -> bool:
    return instance.path.startswith("unit")


def pipelines(*, on_unit: bool = False) -> list[Pipeline]:
    """Those of M1, or those for the matrix unit, which M1 has not: see shim/unit_product.h."""
    found = []
    for instance in _native.catalogue():
        if is_on_unit(instance) != on_unit:
            continue
        variants = VARIANTS.get(instance.kind, {"": ()})
        largest = LARGEST_UNIT_PAIR if on_unit else LARGEST_PAIR
        shared = instance.path.endswith("team")
        if instance.kind == "backward_dkdv" and not shared and instance.head_dim + instance.value_dim > largest:
            variants = APART
        if on_unit:
            variants = {name: names for name, names in variants.items() if not name.endswith("ds")}
        for variant, names in variants.items():
            name = f"{instance.name}/{variant}" if variant else instance.name
            if instance.kind == "decode" and instance.head_dim == 576:
                names = (*names, "value_is_key")  # as MLA decodes
            indices = sorted(CONSTANTS[constant] for constant in (*PLAIN, *names))
            found.append(Pipeline(name, instance.threads, tuple(indices)))
    return found


def constants_of(pipeline: Pipeline) -> dict[int, bool]:
    """By index; every function constant has a value, as in every launch."""
    return {index: index in pipeline.constants for index in sorted(CONSTANTS.values())}


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _code(path: Path) -> str:
    """Without comments and layout, which change nothing."""
    return " ".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")).split())


def _included(path: Path, found: set[Path]) -> set[Path]:
    """A header and what it includes."""
    if path not in found:
        found.add(path)
        for name in re.findall(r'^#include "(\w+\.h)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            _included(path.parent / name, found)
    return found


def sources() -> dict[str, str]:
    """By family, a digest of the Metal code that its instances are compiled from; of M1's."""
    rows = (METAL / "instances.def").read_text(encoding="utf-8")
    families = sorted({family_of(instance) for instance in _native.catalogue() if not is_on_unit(instance)})
    return {
        family: _digest(
            [_code(path) for path in sorted(_included(METAL / f"{family}.h", set()))]
            + re.findall(rf"^{family.removesuffix('_team').upper()}\(.*\)$", rows, re.MULTILINE)
        )
        for family in families
    }


def tool() -> str:
    """A digest of what makes numbers of it: this folder's code, and the translation that it shares."""
    folders = [HERE, HERE / "shim", HERE / "translator", ROOT / "csrc/simulator/cuda", ROOT / "csrc/simulator/msl"]
    files = [path for folder in folders for path in folder.glob("*.*") if path.suffix in (".c", ".h", ".patch")]
    files += [HERE / name for name in ("emit.py", "instances.py", "measure.py", "toolchain.py")]
    return _digest([path.read_text(encoding="utf-8") for path in sorted(files)])
