"""Problems for plan() and plan_backward(), as hypothesis draws them, and what the tests of both ask about them."""

import math
import re
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from mfa import _native as native

CATALOGUE = {instance.name: instance for instance in native.catalogue()}
METAL = Path(__file__).parents[1] / "metal"

FAMILIES = ["apple7", "apple8", "apple9", "apple10"]
DTYPES = ["f16", "bf16", "f32"]
ELEMENT_SIZE = {"f16": 2, "bf16": 2, "f32": 4}
BUCKETS = [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
BUCKETS += [(320, 320), (384, 384), (512, 512)]
LATENT = (576, 512)  # MLA's bucket, which takes no others
BUCKET_EDGES = sorted({dim + step for bucket in BUCKETS for dim in bucket for step in (-1, 0, 1)} - {513} | {1, 8, 72})
TILE_EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 300, 2**20 + 3, 2**29]

dims = st.sampled_from(BUCKET_EDGES) | st.integers(1, 512)
lengths = st.sampled_from(TILE_EDGES) | st.integers(0, 5000)
counts = st.sampled_from([0, 1, 1, 2]) | st.integers(0, 70000)
strides = st.sampled_from([(8, 2**24), (8, 2**37), (1, 2**40)]).flatmap(
    lambda step: st.tuples(*[st.integers(0, step[1]).map(lambda n: step[0] * n)] * 3)
)
TENSORS = ("query", "key", "value", "out")
bounds = st.none() | st.integers(-300, 300) | st.integers(-(2**63), 2**63 - 1)
BIAS_BYTES = {"mask": 1, "float32": 4}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    problem = {
        "family": draw(st.sampled_from(FAMILIES)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "batch": draw(counts),
        "key_heads": draw(st.integers(1, 64)),
        "query_length": draw(lengths),
        "key_length": draw(lengths),
        "head_dim": draw(dims),
        "value_dim": draw(dims),
        "aligned": draw(st.booleans()),
        "window_left": draw(bounds),
        "window_right": draw(bounds),
        "wants_lse": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 30.0])),
        "has_sinks": draw(st.booleans()),
        "alibi": draw(st.sampled_from(["none", "per_head", "per_batch"])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "bias": draw(st.sampled_from(["none", "none", "mask", "same_dtype", "float32"])),
    }
    problem["query_heads"] = problem["key_heads"] * draw(counts)
    for tensor in TENSORS:
        problem[f"{tensor}_strides"] = draw(strides)
    assume(problem["query_length"] + problem["key_length"] <= 2**30 - 1024)
    assume(problem["batch"] * max(problem["query_heads"], problem["key_heads"]) < 2**31)
    if problem["bias"] != "none":
        problem["bias_sizes"] = tuple(draw(st.sampled_from([1, size])) for size in full_sizes(problem))
        assume(math.prod(problem["bias_sizes"]) < 2**63)  # elements of a tensor
        problem["bias_strides"] = tuple(draw(st.integers(0, 2**40)) for _ in range(4))
    return problem


def full_sizes(problem: dict[str, Any]) -> tuple[int, int, int, int]:
    """[B,Hq,Lq,Lk]."""
    return tuple(problem[field] for field in ("batch", "query_heads", "query_length", "key_length"))  # type: ignore[return-value]


def bucket(problem: dict[str, Any]) -> tuple[int, int]:
    """The first that holds D and Dv."""
    return next((d, v) for d, v in BUCKETS if problem["head_dim"] <= d and problem["value_dim"] <= v)


def aligned(problem: dict[str, Any], strides: dict[str, tuple[int, int, int]]) -> bool:
    """Every row of every tensor starts at a multiple of 16 bytes, and less than 2**28 elements after the one before it.

    A name ends with what the tensor is as long as.
    """
    ends = {"key": "key", "value": "key", "query": "query", "out": "query"}
    sizes = {s: (problem["batch"], problem[f"{s}_heads"], problem[f"{s}_length"]) for s in ("query", "key")}
    return problem["aligned"] and all(
        stride * ELEMENT_SIZE[problem["dtype"]] % 16 == 0 and (i != 2 or stride < 2**28)
        for name, steps in strides.items()
        for i, (size, stride) in enumerate(zip(sizes[ends[name.removeprefix("grad_")]], steps, strict=True))
        if size > 1
    )


def tiles(length: int, size: int) -> int:
    return -(-length // size)


def score_constants(problem: dict[str, Any], kernel: str) -> dict[str, bool]:
    """The function constants of a problem's features, in a kernel that computes scores."""
    row = CATALOGUE[kernel]
    return {
        "is_exact_head": (problem["head_dim"], problem["value_dim"]) == (row.head_dim, row.value_dim),
        "has_bias": problem["bias"] != "none",
        "has_mask": problem["bias"] == "mask",
        "has_float_bias": problem["bias"] == "float32",
        "has_softcap": problem["softcap"] > 0,
        "has_alibi": problem["alibi"] != "none",
        "has_dropout": problem["dropout_p"] > 0,
    }


def packs(problem: dict[str, Any]) -> bool:
    """Whether decode runs: it reads K and V less often than forward; or as often, in parts or by one SIMD-group; or
    alone has code for tails on the matrix unit."""
    group = problem["query_heads"] // problem["key_heads"]
    rows, tile = problem["query_length"] * group, decode_tile(problem)
    on_unit = tile.path.startswith("unit")
    if problem["dropout_p"] > 0:
        return False
    if is_empty(problem):
        return rows <= 128 or on_unit
    [launch] = native.plan(**problem | {"has_correction": True, "bias": "none"}).launches  # which only forward leaves
    forward = CATALOGUE[launch.kernel]
    if on_unit and not forward.path.startswith("unit"):
        return True
    if rows > (512 if on_unit else 128):
        return False
    reads = tiles(rows, tile.rows), group * tiles(problem["query_length"], forward.rows)
    return reads[0] < reads[1] or (reads[0] == reads[1] and (tile.simdgroups == 1 or is_split(problem)))


def is_empty(problem: dict[str, Any]) -> bool:
    return not (problem["batch"] and problem["query_heads"] and problem["query_length"])


def is_split(problem: dict[str, Any]) -> bool:
    """Whether there are keys for two parts, and too few tiles for a GPU. With as many reads as forward has."""
    rows, tile = problem["query_length"] * problem["query_heads"] // problem["key_heads"], decode_tile(problem)
    row_tiles, least = tiles(rows, tile.rows), max(min(256, max(64, 32 * rows)), 5 * rows)
    wanted = 192 if tile.simdgroups == 1 else 128
    groups = problem["batch"] * problem["key_heads"] * row_tiles
    if tile.simdgroups > 1 and groups < 16 and problem["key_length"] < 2 * least:
        least = max(64, 2 * rows)
    return problem["key_length"] >= max(512, 2 * least) and groups < wanted


def decode_tile(problem: dict[str, Any]) -> native.Instance:
    """The smallest that holds all of a group's rows, or the largest; of such two the matrix unit's, where that is."""
    rows = problem["query_length"] * problem["query_heads"] // problem["key_heads"]
    on_unit = problem.get("family") == "apple10"
    found = (
        row
        for row in CATALOGUE.values()
        if (row.kind, row.dtype, (row.head_dim, row.value_dim)) == ("decode", problem["dtype"], bucket(problem))
        and (on_unit or not row.path.startswith("unit"))
    )
    return min(found, key=lambda row: (-min(rows, row.rows), row.rows, not row.path.startswith("unit")))


def classifies(problem: dict[str, Any]) -> bool:
    """Whether mask_blocks runs: see tuning.def."""
    if problem["bias"] == "none" or problem["key_length"] < 128:
        return False
    read = BIAS_BYTES.get(problem["bias"], ELEMENT_SIZE[problem["dtype"]])
    scores = 1
    for size, whole in zip(problem["bias_sizes"], full_sizes(problem), strict=True):
        read *= size
        scores *= whole
    return read <= scores


def declared_constants() -> list[str]:
    return re.findall(r"^constant \w+ (\w+) \[\[function_constant", (METAL / "features.h").read_text(), re.M)
