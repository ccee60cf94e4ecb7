"""plan() and catalogue(): pure, so they are tested everywhere. The backward pass is in test_plan_backward.py."""

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_problems import (
    BUCKET_EDGES,
    CATALOGUE,
    DTYPES,
    FAMILIES,
    METAL,
    TENSORS,
    aligned,
    bucket,
    classifies,
    declared_constants,
    decode_tile,
    is_empty,
    packs,
    problems,
    score_constants,
    tiles,
)

from mfa import _native as native


def test_catalogue_rows_are_those_of_the_table() -> None:
    assert len(CATALOGUE) == len(native.catalogue()), "two instances share a name"
    tables = (METAL / "instances.def").read_text() + (METAL / "unit" / "instances.def").read_text()
    rows = re.findall(r"^([A-Z_]+)\((\w+), ", tables, re.M)
    expected = [f"tile_map_of_{of}" if macro == "TILE_MAP" else f"{macro.lower()}_{of}" for macro, of in rows]
    assert sorted(prefix(row) for row in CATALOGUE.values()) == sorted(expected)


def prefix(row: native.Instance) -> str:
    """Of its name; a map of tiles has no dtype."""
    return str(row.kind) if row.kind.startswith("tile_map") else f"{row.kind}_{row.dtype}"


def test_catalogue_rows_are_launchable() -> None:
    for name, row in CATALOGUE.items():
        assert name.startswith(f"{prefix(row)}_")
        assert f"_s{row.simdgroups}" in name or row.kind in ("decode", "combine")
        assert row.threads == 32 * row.simdgroups <= 1024
        assert 0 <= row.threadgroup_memory <= 32768
        assert row.head_dim == 0 or f"_d{row.head_dim}" in name
        assert row.value_dim == 0 or f"_v{row.value_dim}" in name
        tiles = re.search(r"_r(\d+)", name)
        members = {"team": 4, "unit_team": 2 if row.head_dim <= 256 else 4}.get(row.path, 1)
        if row.path == "team" and row.kind.startswith("backward"):
            members = row.simdgroups
        if row.path == "unit_team" and row.kind == "backward_dkdv":
            members = max(2, (row.head_dim + row.value_dim) // 128)  # of 128 columns of dK and dV, or 160
        owners = row.simdgroups // members
        assert tiles is None or row.rows == 8 * int(tiles[1]) * owners
        if row.kind == "forward":
            assert (row.threadgroup_memory == 0) == (row.path in ("direct", "unit"))


def attention_launch(plan: native.Plan, problem: dict[str, Any]) -> native.Launch:
    """The launch that computes scores; checks the one of mask_blocks or combine, where there is one."""
    if packs(problem):
        launch, *after = plan.launches
        assert len(after) == (plan.params.splits > 1) == launch.constants["is_split"]
        for combine in after:
            assert CATALOGUE[combine.kernel].kind == "combine"
            assert combine.constants["writes_lse"] == problem["wants_lse"]
            rows = problem["batch"] * problem["query_heads"] * problem["query_length"]
            assert combine.grid == (tiles(rows * tiles(problem["value_dim"], 8), 128), 1, 1)
            assert plan.partial_lse_bytes == 4 * rows * plan.params.splits
            assert plan.partial_out_bytes == plan.partial_lse_bytes * problem["value_dim"]
        return launch
    *before, launch = plan.launches
    assert len(before) == classifies(problem)
    if before:
        batch, heads, rows, columns = problem["bias_sizes"]
        row = CATALOGUE[before[0].kernel]
        assert before[0].grid == (tiles(columns, row.block), tiles(rows, row.rows), batch * heads)
        assert plan.mask_class_bytes == 16 * tiles(columns, 128) * tiles(rows, 128) * batch * heads
    return launch


@given(problems())
def test_every_row_is_covered_once_within_limits(problem: dict[str, Any]) -> None:
    plan = native.plan(**problem)
    if is_empty(problem):
        assert [CATALOGUE[launch.kernel].kind for launch in plan.launches] in ([], ["mask_blocks"])
        return
    launch = attention_launch(plan, problem)
    row = CATALOGUE[launch.kernel]
    if packs(problem):
        assert row.kind == "decode"
        assert row.name == decode_tile(problem).name
        rows = problem["query_length"] * problem["query_heads"] // problem["key_heads"]
        grid = (problem["key_heads"] * tiles(rows, row.rows), plan.params.splits, problem["batch"])
        assert plan.params.splits * plan.params.split_keys >= problem["key_length"]
        assert (plan.params.splits - 1) * plan.params.split_keys < max(1, problem["key_length"])
    else:
        assert row.kind == "forward"
        grid = (problem["query_heads"], tiles(problem["query_length"], row.rows), problem["batch"])
    assert launch.grid == grid
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
    assert params.alibi_batch_stride == (problem["query_heads"] if problem["alibi"] == "per_batch" else 0)
    if problem["bias"] != "none":
        sizes = params.bias_batch, params.bias_heads, params.bias_rows, params.bias_columns
        assert sizes == problem["bias_sizes"]
        for size, stride, given in zip(sizes, params.bias_strides, problem["bias_strides"], strict=True):
            assert stride == (0 if size == 1 else given)


@given(problems())
def test_constants(problem: dict[str, Any]) -> None:
    plan = native.plan(**problem)
    if is_empty(problem):
        return
    launch = attention_launch(plan, problem)
    is_split = plan.params.splits > 1
    used = score_constants(problem, launch.kernel) | {
        "writes_lse": problem["wants_lse"] and not is_split,
        "is_split": is_split,
        "is_aligned": aligned(problem, {name: problem[f"{name}_strides"] for name in TENSORS}),
        "has_sinks": problem["has_sinks"],
        "has_mask_blocks": classifies(problem) and not packs(problem),
    }
    constants = dict(launch.constants)
    constants.pop("has_window")  # test_window_is_canonical
    assert {name: value for name, value in constants.items() if value} == {n: v for n, v in used.items() if v}


def test_constants_are_those_of_the_kernels() -> None:
    [launch] = native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64).launches
    assert list(launch.constants) == declared_constants()


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_odd_stride_spoils_the_alignment(tensor: str, dimension: int, dtype: str) -> None:
    for stride in (0, 3, 4, 8, 12, 2**28 - 8, 2**28, 2**40 - 8):
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
            steps = {name: problem[f"{name}_strides"] for name in TENSORS}
            assert launch.constants["is_aligned"] == aligned(problem, steps), (stride, batch, query_heads, query_length)


@given(problems())
def test_instance_holds_the_problem_at_least_cost(problem: dict[str, Any]) -> None:
    if is_empty(problem):
        return
    launch = attention_launch(native.plan(**problem), problem)
    row = CATALOGUE[launch.kernel]
    assert row.dtype == problem["dtype"]
    assert (row.head_dim, row.value_dim) == bucket(problem)
    if row.kind == "forward" and row.path in ("direct", "unit", "unit_team"):  # have no code for tails
        assert problem["family"] in ("apple9", "apple10")[row.path != "direct" :]
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


def path(**problem: Any) -> str:
    problem = {"dtype": "f32", "query_length": 256, "key_length": 64, "head_dim": 64, "value_dim": 64} | problem
    [launch] = native.plan(**problem).launches
    return str(CATALOGUE[launch.kernel].path)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, 320, 384, 512])
def test_m5_runs_16_bits_on_the_matrix_unit(dim: int, dtype: str) -> None:
    own = {"dtype": dtype, "head_dim": dim, "value_dim": dim}
    older = "team" if dim > 256 else "staged"
    unit = "unit_team" if dim > 128 else "unit"
    assert [path(family=family, **own) for family in FAMILIES] == [older, older, older, unit]
    assert path(family="apple10", **own | {"dtype": "f32"}) == path(family="apple9", **own | {"dtype": "f32"})
    for tails in ({"aligned": False}, {"head_dim": dim - 8}, {"value_dim": dim - 8}):
        trained = own | tails | {"has_correction": True}
        assert path(family="apple10", **own | tails).startswith("unit")
        assert path(family="apple10", **trained) == path(family="apple9", **trained)


def test_newer_families_read_aligned_float32_directly() -> None:
    assert [path(family=family) for family in FAMILIES] == ["staged", "staged", "direct", "direct"]
    assert path(family="apple9", dtype="f16") == "staged"
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
        {"head_dim": 513},
        {"head_dim": 576},
        {"value_dim": 513},
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
        {"softcap": -1.0},
        {"softcap": float("inf")},
        {"dropout_p": 1.0},
        {"dropout_p": -0.1},
        {"batch": 2**16, "query_heads": 2**15},
        {"bias": "mask", "bias_sizes": (1, 1, 64, 65)},
        {"bias": "mask", "bias_sizes": (1, 2, 1, 1)},
        {"bias": "mask", "bias_strides": (0, 0, 0, -1)},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_refused(wrong: dict[str, Any]) -> None:
    problem = {"query_length": 64, "key_length": 64, "head_dim": 64, "value_dim": 64}
    native.plan(**problem)
    with pytest.raises(ValueError, match=r"must|is 'f64'"):
        native.plan(**(problem | wrong))


def one(**problem: Any) -> native.AttentionParams:
    return native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64, **problem).params


def test_scale_is_for_powers_of_two() -> None:
    params = one(scale=0.125)
    assert params.scale == 0.125
    assert params.scale_log2 == pytest.approx(0.125 * 1.4426950408889634, rel=2**-24)


@given(st.floats(0, 1, exclude_max=True))
@example(2**-18)
@example(1 - 2**-40)
def test_dropout_is_drawn_from_sixteen_bits(p: float) -> None:
    params = one(dropout_p=p)
    assert params.dropout_threshold == min(int(p * 65536 + 0.5), 65535)
    kept = 1 - params.dropout_threshold / 65536  # so that the expectation is exact
    assert params.dropout_factor == pytest.approx(1 / kept, rel=2**-24)
    [launch] = native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64, dropout_p=p).launches
    assert launch.constants["has_dropout"] == (params.dropout_threshold > 0)


@given(st.floats(0, 1.7e308), st.floats(-1e6, 1e6))
def test_softcap_can_be_divided_by(softcap: float, scale: float) -> None:
    params = one(softcap=softcap, scale=scale)
    assert (params.softcap == 0) == (softcap == 0)
    if softcap:
        assert abs(params.scale) <= params.softcap * 1.0000001e30 < float("inf")
        if abs(scale) * 1e-30 <= softcap <= 1e30 and softcap > 1e-37:
            assert params.softcap == pytest.approx(softcap, rel=2**-24)


def test_a_bias_is_classified_where_heads_share_it() -> None:
    def kinds(**problem: Any) -> list[str]:
        shape = {
            "query_length": 256,
            "key_length": 256,
            "query_heads": 4,
            "key_heads": 4,
            "head_dim": 64,
            "value_dim": 64,
        }
        plan = native.plan(**(shape | problem))
        return [str(CATALOGUE[launch.kernel].kind) for launch in plan.launches]

    both, plain = ["mask_blocks", "forward"], ["forward"]
    assert kinds(bias="mask", bias_sizes=(1, 4, 256, 256)) == both
    assert kinds(bias="mask", bias_sizes=(1, 1, 1, 64), key_length=64) == plain
    assert kinds(bias="same_dtype", bias_sizes=(1, 4, 256, 256)) == plain
    assert kinds(bias="same_dtype", bias_sizes=(1, 1, 256, 256)) == both
    assert kinds(bias="float32", bias_sizes=(1, 1, 256, 256), query_heads=3, key_heads=3) == plain
    assert kinds(bias="float32", bias_sizes=(1, 4, 1, 256)) == both
    assert kinds() == plain


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="no argument head"):
        native.plan(query_length=1, key_length=1, head=64)


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


def test_what_torch_keeps_is_not_reported_as_leaked() -> None:
    code = """
import torch
import mfa
from mfa import _native

library = torch.library.Library("mfa_kept", "FRAGMENT")
library.define("copy(Tensor x) -> Tensor")
library.impl("copy", lambda x: x.clone(), "CPU")  # torch keeps it, it keeps the globals, and they keep this:
kept = _native.plan(query_length=1, key_length=1, head_dim=64, value_dim=64)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
