"""plan() and catalogue(): pure, so they are tested everywhere."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mfa import _native as native

CATALOGUE = {instance.name: instance for instance in native.catalogue()}
METAL = Path(__file__).parents[1] / "metal"

FAMILIES = ["apple7", "apple8", "apple9", "apple10"]
DTYPES = ["f16", "bf16", "f32"]
ELEMENT_SIZE = {"f16": 2, "bf16": 2, "f32": 4}
BUCKETS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
BUCKET_EDGES = sorted({dim + step for bucket in BUCKETS for dim in bucket for step in (-1, 0, 1)} - {257} | {1, 8, 80})
TILE_EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 300, 2**20 + 3, 2**29]

dims = st.sampled_from(BUCKET_EDGES) | st.integers(1, 256)
lengths = st.sampled_from(TILE_EDGES) | st.integers(0, 5000)
counts = st.sampled_from([0, 1, 1, 2]) | st.integers(0, 70000)
strides = st.tuples(*[st.integers(0, 2**37).map(lambda n: 8 * n)] * 3) | st.tuples(*[st.integers(0, 2**40)] * 3)
TENSORS = ("query", "key", "value", "out")
bounds = st.none() | st.integers(-300, 300) | st.integers(-(2**63), 2**63 - 1)


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
    }
    problem["query_heads"] = problem["key_heads"] * draw(counts)
    for tensor in TENSORS:
        problem[f"{tensor}_strides"] = draw(strides)
    assume(problem["query_length"] + problem["key_length"] <= 2**30 - 1024)
    return problem


def test_catalogue_rows_are_launchable() -> None:
    assert len(CATALOGUE) == len(native.catalogue()), "two instances share a name"
    for name, row in CATALOGUE.items():
        assert name == (
            f"forward_{row.dtype}_d{row.head_dim}_v{row.value_dim}_{row.path}"
            f"_s{row.simdgroups}_r{row.row_tiles}_k{row.block_keys}"
        )
        assert row.threads == 32 * row.simdgroups <= 1024
        assert row.block_queries == 8 * row.row_tiles * row.simdgroups
        assert 0 <= row.threadgroup_memory <= 32768
        assert (row.threadgroup_memory == 0) == (row.path == "direct")


@given(problems())
def test_every_row_is_covered_once_within_limits(problem: dict[str, Any]) -> None:
    plan = native.plan(**problem)
    if not (problem["batch"] and problem["query_heads"] and problem["query_length"]):
        assert plan.launches == []
        return
    [launch] = plan.launches
    row = CATALOGUE[launch.kernel]
    heads, tiles, batch = launch.grid
    assert (heads, batch) == (problem["query_heads"], problem["batch"])
    assert (tiles - 1) * row.block_queries < problem["query_length"] <= tiles * row.block_queries
    assert launch.group == (row.threads, 1, 1)
    assert launch.threadgroup_memory == row.threadgroup_memory


@given(problems())
def test_params_say_the_problem(problem: dict[str, Any]) -> None:
    params = native.plan(**problem).params
    for field in ("batch", "query_heads", "key_heads", "query_length", "key_length", "head_dim", "value_dim"):
        assert getattr(params, field) == problem[field]
    assert params.group_size * params.key_heads == params.query_heads
    for tensor in TENSORS:
        assert getattr(params, f"{tensor}_strides") == problem[f"{tensor}_strides"]
    # What the kernels compute with 32 bits: a position, plus or minus a bound, plus a tile.
    longest = params.query_length + params.key_length
    assert max(abs(params.window_left), abs(params.window_right)) <= longest
    assert 2 * longest + 1024 < 2**31


def aligned(problem: dict[str, Any]) -> bool:
    """Every row of every tensor starts at a multiple of 16 bytes."""
    sizes = {
        "query": (problem["batch"], problem["query_heads"], problem["query_length"]),
        "key": (problem["batch"], problem["key_heads"], problem["key_length"]),
    }
    sizes |= {"out": sizes["query"], "value": sizes["key"]}
    return problem["aligned"] and all(
        stride * ELEMENT_SIZE[problem["dtype"]] % 16 == 0
        for tensor, shape in sizes.items()
        for size, stride in zip(shape, problem[f"{tensor}_strides"], strict=True)
        if size > 1
    )


@given(problems())
def test_constants(problem: dict[str, Any]) -> None:
    plan = native.plan(**problem)
    for launch in plan.launches:
        row = CATALOGUE[launch.kernel]
        constants = dict(launch.constants)
        constants.pop("has_window")  # test_window_is_canonical
        assert constants == {
            "writes_lse": problem["wants_lse"],
            "is_aligned": aligned(problem),
            "is_exact_head": (problem["head_dim"], problem["value_dim"]) == (row.head_dim, row.value_dim),
        }


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_odd_stride_spoils_the_alignment(tensor: str, dimension: int, dtype: str) -> None:
    for stride in (0, 3, 4, 8, 12, 2**40 - 8):
        for batch, query_heads, key_heads, query_length, key_length in (
            (1, 1, 1, 1, 1),
            (2, 2, 2, 2, 2),
            (1, 2, 1, 2, 1),
            (2, 1, 1, 1, 2),
        ):
            problem = {
                "dtype": dtype,
                "batch": batch,
                "query_heads": query_heads,
                "key_heads": key_heads,
                "query_length": query_length,
                "key_length": key_length,
                "head_dim": 64,
                "value_dim": 64,
                "aligned": True,
            }
            problem |= {f"{other}_strides": (16, 16, 16) for other in TENSORS}
            problem[f"{tensor}_strides"] = tuple(stride if i == dimension else 16 for i in range(3))
            [launch] = native.plan(**problem).launches
            assert launch.constants["is_aligned"] == aligned(problem), (stride, batch, query_heads, query_length)


def test_constants_are_those_of_the_kernels() -> None:
    [launch] = native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64).launches
    declared = re.findall(r"^constant \w+ (\w+) \[\[function_constant", (METAL / "features.h").read_text(), re.M)
    assert sorted(launch.constants) == sorted(declared)


@given(problems())
def test_instance_holds_the_problem_at_least_cost(problem: dict[str, Any]) -> None:
    for launch in native.plan(**problem).launches:
        row = CATALOGUE[launch.kernel]
        assert row.dtype == problem["dtype"]
        fits = [(d, v) for d, v in BUCKETS if problem["head_dim"] <= d and problem["value_dim"] <= v]
        assert (row.head_dim, row.value_dim) == fits[0]
        if row.path == "direct":  # has no code for tails
            assert problem["family"] in ("apple9", "apple10")
            assert launch.constants["is_aligned"]
            assert launch.constants["is_exact_head"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dimension_has_an_instance(family: str, dtype: str) -> None:
    for head_dim in BUCKET_EDGES:
        for value_dim in BUCKET_EDGES:
            for is_aligned in (False, True):
                [launch] = native.plan(
                    family=family,
                    dtype=dtype,
                    query_length=1,
                    key_length=1,
                    head_dim=head_dim,
                    value_dim=value_dim,
                    aligned=is_aligned,
                ).launches
                assert launch.kernel in CATALOGUE


def test_newer_families_read_aligned_problems_directly() -> None:
    def path(**problem: Any) -> str:
        problem = {"query_length": 64, "key_length": 64, "head_dim": 64, "value_dim": 64} | problem
        [launch] = native.plan(**problem).launches
        return str(CATALOGUE[launch.kernel].path)

    assert [path(family=family) for family in FAMILIES] == ["staged", "staged", "direct", "direct"]
    assert path(family="apple9", aligned=False) == "staged"
    assert path(family="apple9", head_dim=63) == "staged"
    assert path(family="apple9", value_dim=72, head_dim=96) == "staged"


def sees(i: int, j: int, lq: int, lk: int, left: int | None, right: int | None) -> bool:
    diagonal = i + lk - lq
    return (left is None or diagonal - left <= j) and (right is None or j <= diagonal + right)


small_bounds = st.none() | st.integers(-12, 12) | st.sampled_from([-(2**63), 2**63 - 1, 2**31, -(2**31) - 1])


@given(st.integers(0, 5), st.integers(0, 5), small_bounds, small_bounds)
@example(1, 5, 4, 0)  # a decoding step: causal hides nothing
@example(3, 5, None, 2)
def test_window_is_canonical(lq: int, lk: int, left: int | None, right: int | None) -> None:
    plan = native.plan(query_length=lq, key_length=lk, head_dim=64, value_dim=64, window_left=left, window_right=right)
    pairs = [(i, j) for i in range(lq) for j in range(lk)]
    seen = [sees(i, j, lq, lk, left, right) for i, j in pairs]
    assert [sees(i, j, lq, lk, plan.params.window_left, plan.params.window_right) for i, j in pairs] == seen
    for launch in plan.launches:
        assert launch.constants["has_window"] == (not all(seen))
    if lq:
        counts = [sum(sees(i, j, lq, lk, left, right) for j in range(lk)) for i in range(lq)]
        assert plan.params.heavy_first == (counts[-1] > counts[0])


@pytest.mark.parametrize(
    ("left", "right", "heavy_first"),
    [(None, None, 0), (None, 0, 1), (127, 0, 1), (0, None, 0), (64, 64, 0)],
    ids=["open", "causal", "sliding", "anticausal", "band"],
)
def test_heavy_tiles_come_first(left: int | None, right: int | None, heavy_first: int) -> None:
    plan = native.plan(
        query_length=1024, key_length=1024, head_dim=64, value_dim=64, window_left=left, window_right=right
    )
    assert plan.params.heavy_first == heavy_first


@pytest.mark.parametrize(
    "wrong",
    [
        {"family": "apple6"},
        {"dtype": "f64"},
        {"head_dim": 0},
        {"head_dim": 257},
        {"value_dim": 257},
        {"batch": 2**31},
        {"batch": -1},
        {"query_heads": 2**31, "key_heads": 1},
        {"query_heads": 3, "key_heads": 2},
        {"key_heads": 0},
        {"query_length": 2**30},
        {"key_length": 2**30 - 1024},
        {"key_length": 2**63 - 1},
        {"key_length": -1},
        {"key_strides": (0, -1, 0)},
        {"scale": float("nan")},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_refused(wrong: dict[str, Any]) -> None:
    problem = {"query_length": 64, "key_length": 64, "head_dim": 64, "value_dim": 64}
    native.plan(**problem)
    with pytest.raises(ValueError, match=r"must|is 'f64'"):
        native.plan(**(problem | wrong))


def test_scale_is_for_powers_of_two() -> None:
    params = native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64, scale=0.125).params
    assert params.scale_log2 == pytest.approx(0.125 * 1.4426950408889634, rel=2**-24)


def test_native_needs_no_torch() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", {native.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.plan(query_length=1, key_length=1, head_dim=64, value_dim=64).launches
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
