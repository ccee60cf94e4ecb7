"""What runs where: the one table that the README shows, `python -m mfa info` prints and tests/test_readme.py checks."""

from typing import NamedTuple

from . import _checks, _native

# Whether this source tree can launch kernels on tensors whose device is mps.
RUNS_ON_MPS = False

_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # as the catalogue names them
_CPU_DIMS = f"1 ... {_checks.LARGEST_HEAD_DIM}"
_FAMILIES = {"apple7": "M1", "apple8": "M2", "apple9": "M3, M4", "apple10": "M5"}


class Feature(NamedTuple):
    """One thing a caller may ask for."""

    name: str
    cpu: bool  # CPU tensors
    kernels: bool  # the Metal kernels: mps tensors, and CPU tensors inside mfa.simulate()


FEATURES = (
    Feature("forward, any length", cpu=True, kernels=True),
    Feature("gradients", cpu=True, kernels=False),
    Feature("`is_causal`", cpu=True, kernels=True),
    Feature("`window`", cpu=True, kernels=True),
    Feature("`enable_gqa`", cpu=True, kernels=True),
    Feature("Dv other than D", cpu=True, kernels=True),
    Feature("`return_lse`", cpu=True, kernels=True),
    Feature("`attn_mask`", cpu=True, kernels=False),
    Feature("`softcap`", cpu=True, kernels=False),
    Feature("`alibi_slopes`", cpu=True, kernels=False),
    Feature("`sinks`", cpu=True, kernels=False),
    Feature("`dropout_p`", cpu=False, kernels=False),
)


def head_dims(dtype: str, family: str) -> dict[str, list[str]]:
    """Buckets of D (or D x Dv) by the path that `family` takes in them; a smaller D runs in the next bucket."""
    rows = {row.name: row for row in _native.catalogue()}
    paths: dict[str, list[str]] = {}
    for head, value in sorted({(row.head_dim, row.value_dim) for row in rows.values()}):
        plan = _native.plan(
            family=family, dtype=_DTYPES[dtype], query_length=1, key_length=1, head_dim=head, value_dim=value
        )
        bucket = str(head) if head == value else f"{head}x{value}"
        paths.setdefault(rows[plan.launches[0].kernel].path, []).append(bucket)
    return paths


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown() -> str:
    """Both tables: dtype x D by GPU family, and feature by device."""
    families: dict[str, list[str]] = {}  # families that choose alike, under one heading
    for family, chips in _FAMILIES.items():
        cells = ["; ".join(f"{path} {' '.join(dims)}" for path, dims in head_dims(d, family).items()) for d in _DTYPES]
        heading = next((h for h, known in families.items() if known == cells), None)
        if heading is not None:
            families[f"{heading}, {chips}"] = families.pop(heading)
        else:
            families[chips] = cells
    dims = [[dtype, _CPU_DIMS, *(cells[i] for cells in families.values())] for i, dtype in enumerate(_DTYPES)] + [
        ["float64", _CPU_DIMS] + ["no"] * len(families)
    ]
    features = [
        [f.name, *("yes" if c else "no" for c in (f.cpu, f.kernels)), "yes" if f.kernels and RUNS_ON_MPS else "no"]
        for f in FEATURES
    ]
    return "\n\n".join(
        (
            _markdown(["D by dtype", "`cpu`", *(f"kernels, {chips}" for chips in families)], dims),
            _markdown(["feature", "`cpu`", "`cpu` in `simulate()`", "`mps`"], features),
        )
    )


if __name__ == "__main__":
    print(markdown())  # noqa: T201
