"""What runs where: the one table that the README shows, `python -m mfa info` prints and tests/test_readme.py checks."""

from typing import NamedTuple

from . import _native
from ._checks.tensors import DTYPES, LARGEST_HEAD_DIM, dtype_name

# What kernels do they should do on mps tensors too, through csrc/metal. Nobody has tried yet, so the table says that.
MPS = "`mps`, not run on a Mac yet"

_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # as the catalogue names them
_KINDS = {"forward": "forward", "decode": "decode", "backward_dkdv": "backward"}


class Feature(NamedTuple):
    """One thing a caller may ask for."""

    name: str
    cpu: bool  # CPU tensors
    kernels: bool  # the Metal kernels: mps tensors, and CPU tensors inside mfa.simulate()


FEATURES = (
    Feature("forward, any length", cpu=True, kernels=True),
    Feature("gradients", cpu=True, kernels=True),
    Feature("`is_causal`", cpu=True, kernels=True),
    Feature("`window`", cpu=True, kernels=True),
    Feature("`enable_gqa`", cpu=True, kernels=True),
    Feature("Dv other than D", cpu=True, kernels=True),
    Feature("`return_lse`", cpu=True, kernels=True),
    Feature("`attn_mask`", cpu=True, kernels=True),
    Feature("`block_mask`, with gradients", cpu=True, kernels=True),
    Feature("`softcap`", cpu=True, kernels=True),
    Feature("`alibi_slopes`", cpu=True, kernels=True),
    Feature("`sinks`", cpu=True, kernels=True),
    Feature("gradient of `attn_mask`", cpu=True, kernels=True),
    Feature("`dropout_p`", cpu=True, kernels=True),
    Feature("`merge_attention`", cpu=True, kernels=True),
    Feature("`attention_varlen`, with gradients", cpu=True, kernels=True),
    Feature("`attention_with_kv_cache`", cpu=True, kernels=True),
    Feature("paged cache", cpu=True, kernels=True),
    Feature("packed queries over pages", cpu=True, kernels=True),
    Feature("int8 or float8 cache", cpu=True, kernels=True),
)


def head_dims(kind: str, dtype: str) -> list[str]:
    """Buckets of D (or D x Dv) of one kind of kernel. A smaller D runs in the next one."""
    buckets = {
        (row.head_dim, row.value_dim)
        for row in _native.catalogue()
        if row.kind == kind and row.dtype == _DTYPES.get(dtype)
    }
    return [str(head) if head == value else f"{head}x{value}" for head, value in sorted(buckets)]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown() -> str:
    """Both tables: dtype x D by kind of kernel, and feature by device."""
    kinds = {kind: title for kind, title in _KINDS.items() if head_dims(kind, "float16")}
    dims = [
        [
            dtype,
            f"1 ... {LARGEST_HEAD_DIM}",
            *(" ".join(head_dims(kind, dtype)) or "none" for kind in kinds),
        ]
        for dtype in map(dtype_name, DTYPES)
    ]
    features = [[f.name, *("yes" if can else "no" for can in (f.cpu, f.kernels, f.kernels))] for f in FEATURES]
    return "\n\n".join(
        (
            _markdown(["D, Dv", "`cpu`", *(f"{title} kernels" for title in kinds.values())], dims),
            _markdown(["feature", "`cpu`", "`cpu` in `simulate()`", MPS], features),
        )
    )


if __name__ == "__main__":
    print(markdown())  # noqa: T201
