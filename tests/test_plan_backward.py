"""plan_backward(): what is asked for is computed once, nothing else, and within the scratch."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from plan_problems import (
    BUCKET_EDGES,
    BUCKETS,
    CATALOGUE,
    DTYPES,
    FAMILIES,
    LATENT,
    TENSORS,
    aligned,
    bucket,
    classifies,
    problems,
    score_constants,
    strides,
    tiles,
)

import mfa
from mfa import _library
from mfa import _native as native

GRADIENTS = ("query", "key", "value", "bias", "sinks", "alibi")
TORCH_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
GRAD_TENSORS = ("grad_out", "grad_query", "grad_key", "grad_value")
SHAPE = {"query_length": 512, "key_length": 512, "head_dim": 64, "value_dim": 64}


@st.composite
def backward_problems(draw: st.DrawFn) -> dict[str, Any]:
    problem = draw(problems())
    problem["batch"] = draw(st.integers(0, 40))  # keeps the list of chunks short
    assume(problem["batch"] * max(problem["query_heads"], problem["key_heads"]) < 2**31)
    assume(problem["batch"] * problem["query_heads"] * problem["query_length"] < 2**32)
    if problem["bias"] != "none":
        problem["bias_sizes"] = (draw(st.sampled_from([1, problem["batch"]])), *problem["bias_sizes"][1:])
    can = {
        "bias": problem["bias"] in ("same_dtype", "float32"),
        "sinks": problem["has_sinks"],
        "alibi": problem["alibi"] != "none",
    }
    for name in GRADIENTS:
        problem[f"wants_{name}"] = can.get(name, True) and draw(st.booleans())
    problem["has_grad_lse"] = draw(st.booleans())
    problem["mode"] = draw(st.sampled_from(["automatic", "five_gemm", "seven_gemm"]))
    problem["scratch_limit"] = draw(st.sampled_from([0, 1 << 16, 64 << 20, 1 << 40]) | st.integers(0, 1 << 30))
    for tensor in GRAD_TENSORS:
        problem[f"{tensor}_strides"] = draw(strides)
    return problem


def kind(launch: native.Launch) -> str:
    return str(CATALOGUE[launch.kernel].kind)


def launches_of(plan: native.Plan, *kinds: str) -> list[native.Launch]:
    return [launch for launch in plan.launches if kind(launch) in kinds]


def units(problem: dict[str, Any]) -> int:
    return int(problem["batch"] * problem["key_heads"])


def covered_units(launches: list[native.Launch], per_unit: int = 1) -> list[tuple[int, int]]:
    """(first, end) of each launch's units, merged where they touch; a unit that two launches cover fails."""
    merged: list[tuple[int, int]] = []
    for launch in launches:
        assert launch.grid[0] % per_unit == 0
        first, end = launch.unit[0], launch.unit[0] + launch.grid[0] // per_unit
        assert not merged or first >= merged[-1][1]
        merged[-1:] = [(merged[-1][0], end)] if merged and merged[-1][1] == first else [*merged[-1:], (first, end)]
    return merged


@given(backward_problems())
def test_keys_are_covered_once_for_each_gradient_that_is_wanted(problem: dict[str, Any]) -> None:
    plan = native.plan_backward(**problem)
    for name in ("key", "value"):
        launches = [each for each in launches_of(plan, "backward_dkdv") if each.constants[f"wants_grad_{name}"]]
        has_work = units(problem) > 0 and problem["key_length"] > 0
        wanted = problem[f"wants_{name}"] and has_work
        assert covered_units(launches) == ([(0, units(problem))] if wanted else [])
        for launch in launches:
            assert launch.grid[1:] == (tiles(problem["key_length"], CATALOGUE[launch.kernel].rows), 1)
            both = launch.constants["wants_grad_key"] and launch.constants["wants_grad_value"]
            # Both accumulators fit in registers, or in those of a team.
            assert sum(bucket(problem)) <= 256 or not both or CATALOGUE[launch.kernel].path == "team"


@given(backward_problems())
def test_queries_are_covered_once_by_one_kernel(problem: dict[str, Any]) -> None:
    plan = native.plan_backward(**problem)
    direct, from_ds = launches_of(plan, "backward_dq"), launches_of(plan, "backward_dq_from_ds")
    wanted = problem["wants_query"] or problem["wants_alibi"]
    if not (wanted and problem["batch"] and problem["query_heads"] and problem["query_length"]):
        assert not direct
        assert not from_ds
        return
    assert bool(direct) != bool(from_ds)
    for launch in direct + from_ds:
        assert launch.grid[1] == tiles(problem["query_length"], CATALOGUE[launch.kernel].rows)
    if direct:
        [launch] = direct
        assert (launch.grid[0], launch.grid[2]) == (problem["query_heads"], problem["batch"])
        assert launch.constants["wants_grad_alibi"] == problem["wants_alibi"]
    else:
        group = problem["query_heads"] // problem["key_heads"]
        assert covered_units(from_ds, group) == [(0, units(problem))]
        for launch in from_ds:
            assert launch.grid[2] == tiles(problem["head_dim"], CATALOGUE[launch.kernel].head_dim)


@given(backward_problems())
def test_scratch_is_written_before_it_is_read_and_bounded(problem: dict[str, Any]) -> None:
    plan = native.plan_backward(**problem)
    assert plan.scratch_bytes <= problem["scratch_limit"]
    assert bool(plan.scratch_bytes) == bool(launches_of(plan, "backward_dq_from_ds"))
    blobs = tiles(problem["query_length"], 8) * tiles(problem["key_length"], 8)
    holds = None
    for launch in plan.launches:
        if launch.constants["writes_score_gradient"]:
            assert kind(launch) == "backward_dkdv"
            assert launch.constants["wants_grad_key"]
            holds = (launch.unit[0], launch.grid[0])
            group = problem["query_heads"] // problem["key_heads"]
            assert launch.grid[0] * group * blobs * 64 * 4 <= plan.scratch_bytes
        elif kind(launch) == "backward_dq_from_ds":
            assert holds == (launch.unit[0], launch.grid[0] * problem["key_heads"] // problem["query_heads"])
            holds = None
    assert holds is None


@given(backward_problems())
def test_nothing_else_runs(problem: dict[str, Any]) -> None:
    plan = native.plan_backward(**problem)
    kinds = [kind(launch) for launch in plan.launches]
    assert all(name == "mask_blocks" or name.startswith("backward_") for name in kinds)
    wanted = [name for name in GRADIENTS if problem[f"wants_{name}"]]
    has_rows = bool(problem["batch"] and problem["query_heads"] and problem["query_length"])
    assert kinds.count("backward_delta") == bool(wanted and has_rows)
    assert kinds[:1] == ["backward_delta"] * bool(wanted and has_rows) or not has_rows
    needs_scores = bool(set(wanted) & {"query", "key", "value", "alibi"})
    assert ("mask_blocks" in kinds) <= (needs_scores and classifies(problem))
    assert (plan.mask_class_bytes > 0) == ("mask_blocks" in kinds)
    has_bias = problem["wants_bias"] and 0 not in problem["bias_sizes"]
    assert kinds.count("backward_dbias") == has_bias
    for launch in plan.launches:
        row = CATALOGUE[launch.kernel]
        assert min(launch.grid) > 0
        assert launch.group == (row.threads, 1, 1)
        assert launch.threadgroup_memory == row.threadgroup_memory
        assert row.dtype == problem["dtype"]
        if row.kind == "backward_dq_from_ds" and bucket(problem)[0] > 256:
            assert bucket(problem)[0] % row.head_dim == 0  # a part of it
            continue
        assert row.head_dim in (0, bucket(problem)[0])
        assert row.value_dim in (0, bucket(problem)[1])
    for launch in launches_of(plan, "backward_dbias"):
        batch, heads, rows, columns = problem["bias_sizes"]
        row = CATALOGUE[launch.kernel]
        assert launch.grid == (tiles(columns, row.block), tiles(rows, row.rows), batch * heads)


@given(backward_problems())
def test_constants(problem: dict[str, Any]) -> None:
    names = [*TENSORS, "grad_out"] + [f"grad_{name}" for name in GRADIENTS[:3] if problem[f"wants_{name}"]]
    if problem["wants_alibi"]:
        names.append("grad_query")  # the kernel writes it
    is_aligned = aligned(problem, {name: problem[f"{name}_strides"] for name in names})
    for launch in native.plan_backward(**problem).launches:
        of = kind(launch)
        used = {"is_aligned": is_aligned}
        if of == "mask_blocks":
            used = {"has_bias": True, "has_mask": problem["bias"] == "mask"}
            used["has_float_bias"] = problem["bias"] == "float32"
        elif of == "backward_delta":
            used["has_grad_lse"] = problem["has_grad_lse"]
        elif of == "backward_dq_from_ds":
            used["is_exact_head"] = problem["head_dim"] == bucket(problem)[0]
        else:
            used |= score_constants(problem, launch.kernel)
        if of in ("backward_dkdv", "backward_dq", "backward_dq_from_ds"):
            used["has_mask_blocks"] = classifies(problem)
        elsewhere = ("has_window", "wants_grad_key", "wants_grad_value", "wants_grad_alibi", "writes_score_gradient")
        constants = {name: value for name, value in launch.constants.items() if name not in elsewhere}
        assert {name for name, value in constants.items() if value} == {name for name, value in used.items() if value}


@pytest.mark.parametrize("mode", ["five_gemm", "seven_gemm"])
def test_a_window_is_known_to_every_kernel_that_skips_by_it(mode: str) -> None:
    asked = {"mode": mode, "bias": "same_dtype", "wants_bias": True}
    for right in (None, 0):
        plan = native.plan_backward(**SHAPE, **asked, window_right=right)
        scores = [launch for launch in plan.launches if kind(launch) not in ("mask_blocks", "backward_delta")]
        assert len(scores) == 3
        assert {launch.constants["has_window"] for launch in scores} == {right is not None}
        assert plan.params.heavy_first == (right is not None)


@pytest.mark.parametrize("tensor", GRAD_TENSORS)
@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_one_odd_stride_spoils_the_alignment(tensor: str, dimension: int) -> None:
    problem = SHAPE | {"batch": 2, "query_heads": 2, "key_heads": 2}
    problem |= {f"{other}_strides": (16, 16, 16) for other in (*TENSORS, *GRAD_TENSORS)}

    def is_aligned(**change: Any) -> bool:
        [value] = {launch.constants["is_aligned"] for launch in native.plan_backward(**(problem | change)).launches}
        return bool(value)

    odd = {f"{tensor}_strides": tuple(12 if i == dimension else 16 for i in range(3))}
    assert is_aligned()
    assert not is_aligned(**odd)
    if tensor != "grad_out":
        unwanted = {tensor.replace("grad", "wants"): False}
        assert is_aligned(**odd, **unwanted)  # no kernel touches it then ...
        slopes = {"alibi": "per_head", "wants_alibi": True}
        assert is_aligned(**odd, **unwanted, **slopes) == (tensor != "grad_query")  # ... but for this one


@given(backward_problems())
def test_params_say_the_problem(problem: dict[str, Any]) -> None:
    params = native.plan_backward(**problem).params
    for tensor in (*TENSORS, *GRAD_TENSORS):
        assert getattr(params, f"{tensor}_strides") == problem[f"{tensor}_strides"]


@given(backward_problems())
def test_plans_are_equal_for_equal_problems(problem: dict[str, Any]) -> None:
    def plan() -> list[tuple[Any, ...]]:
        launches = native.plan_backward(**problem).launches
        return [(x.kernel, x.constants, x.grid, x.group, x.unit) for x in launches]

    assert plan() == plan()


def mode_of(plan: native.Plan) -> int:
    return 5 if launches_of(plan, "backward_dq_from_ds") else 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("head_dim", "value_dim"), BUCKETS)
def test_five_gemms_are_the_default_and_seven_a_choice(family: str, head_dim: int, value_dim: int) -> None:
    problem = SHAPE | {"family": family, "head_dim": head_dim, "value_dim": value_dim}
    usual = native.plan_backward(**problem)
    # The reasons are in tuning.def, and in plan_backward.cpp.
    five = 7 if any("_unit_" in launch.kernel for launch in usual.launches) else 5
    assert mode_of(usual) == five
    assert mode_of(native.plan_backward(**problem, mode="five_gemm")) == five
    assert mode_of(native.plan_backward(**problem, mode="seven_gemm")) == 7


ON_UNIT = {  # paths of backward_dkdv, backward_dq, backward_dbias
    (64, 64): ["unit", "unit", "unit"],
    (80, 80): ["unit", "unit", "unit", "unit"],  # dV has a launch of its own
    (96, 96): ["unit_team", "unit", "unit"],
    (128, 128): ["unit_team", "unit", "unit"],
    (192, 128): ["unit_team", "unit_team", "unit"],
    (192, 192): ["unit_team", "unit_team", "unit"],
    (256, 256): ["unit_team", "unit_team", "unit"],
    (320, 320): ["unit_team", "unit_team", "unit"],
    (384, 384): ["unit_team", "unit_team", "unit"],
    (512, 512): ["unit_team", "unit_team", "unit"],
    (576, 512): ["team", "team", "unit"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", ON_UNIT)
def test_what_the_matrix_unit_takes(dtype: str, dims: tuple[int, int]) -> None:
    """Aligned rows of 16 bits, whose D and Dv are the bucket."""
    head_dim, value_dim = dims
    problem = SHAPE | {"family": "apple10", "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}
    problem |= {"bias": "float32", "wants_bias": True, "mode": "seven_gemm"}

    def paths(**change: Any) -> list[str]:
        rows = [CATALOGUE[launch.kernel] for launch in native.plan_backward(**(problem | change)).launches]
        return [row.path for row in rows if row.kind in ("backward_dkdv", "backward_dq", "backward_dbias")]

    changes = [{"head_dim": head_dim - 8}, {"value_dim": value_dim - 8}] if head_dim <= 512 else []
    for change in (*changes, {"aligned": False}, {"family": "apple9"}):
        assert set(paths(**change)) <= {"staged", "team"}
    if dtype == "f32":
        assert set(paths()) <= {"staged", "team"}
    else:
        assert paths() == ON_UNIT[dims]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "f32"},
        {"wants_query": False},
        {"wants_key": False},
        {"wants_alibi": True, "alibi": "per_head"},
        {"scratch_limit": 512 * 512 * 4 - 1},
        {"scratch_limit": 512 * 512 * 4 * 3 - 1, "query_heads": 3},
    ],
    ids=str,
)
def test_seven_gemms_where_five_cannot_run(change: dict[str, Any]) -> None:
    assert mode_of(native.plan_backward(**(SHAPE | {"mode": "five_gemm"} | change))) == 7


@given(st.integers(1, 60), st.integers(1, 60))
@example(7, 3)
def test_chunks_are_as_large_as_the_scratch_and_alike(key_heads: int, fit: int) -> None:
    limit = fit * 512 * 512 * 4
    heads = {"query_heads": key_heads, "key_heads": key_heads}
    plan = native.plan_backward(**SHAPE, **heads, mode="five_gemm", scratch_limit=limit)
    counts = [launch.grid[0] for launch in launches_of(plan, "backward_dkdv")]
    assert len(counts) == tiles(key_heads, fit)
    assert max(counts) - min(counts[:-1], default=max(counts)) == 0
    assert max(counts) == tiles(key_heads, len(counts))


def dense_instances(dtype: str) -> list[native.Instance]:
    """Of both passes; backward_dslopes is for packed sequences alone."""
    rows = [row for row in CATALOGUE.values() if row.dtype == dtype and row.kind != "backward_dslopes"]
    return [row for row in rows if row.kind.startswith(("forward", "backward"))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dimension_has_instances(dtype: str) -> None:
    used = set()
    for head_dim, value_dim in [*itertools.product(BUCKET_EDGES, BUCKET_EDGES), LATENT]:
        for mode in ("five_gemm", "seven_gemm"):
            plan = native.plan_backward(
                **(SHAPE | {"head_dim": head_dim, "value_dim": value_dim}),
                dtype=dtype,
                mode=mode,
                bias="mask" if mode == "five_gemm" else "same_dtype",
                wants_bias=mode == "seven_gemm",
            )
            used |= {launch.kernel for launch in plan.launches}
    rows = [row for row in dense_instances(dtype) if row.kind != "forward"]
    # One that no problem runs in is an alternative to one of the same bucket.
    served = {(row.kind, row.head_dim, row.value_dim) for row in rows if row.name in used}
    assert {(row.kind, row.head_dim, row.value_dim) for row in rows} == served


@pytest.mark.parametrize(
    "wrong",
    [
        {"grad_out_strides": (0, 0, -1)},
        {"grad_key_strides": (-1, 0, 0)},
        {"scratch_limit": -1},
        {"wants_bias": True},
        {"wants_bias": True, "bias": "mask"},
        {"wants_sinks": True},
        {"wants_alibi": True},
        {"mode": "six_gemm"},
        {"head_dim": 513},
        {"batch": 2**21, "query_heads": 4, "key_heads": 4},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_refused(wrong: dict[str, Any]) -> None:
    native.plan_backward(**SHAPE)
    with pytest.raises(ValueError, match="must"):
        native.plan_backward(**(SHAPE | wrong))


@pytest.mark.simulator
@pytest.mark.parametrize("dtype", DTYPES)
def test_catalogue_knows_what_kernels_really_use(dtype: str) -> None:
    """Threadgroup memory of every instance of both passes, as the simulator finds it. Dropout keeps decode away."""
    rows = dense_instances(dtype)
    used: dict[str, int] = {}

    def run(family: str, head_dim: int, value_dim: int) -> None:
        query, value = (
            torch.randn(1, 1, 8, dim, dtype=TORCH_DTYPES[dtype], requires_grad=True) for dim in (head_dim, value_dim)
        )
        bias = torch.randn(8, 8, requires_grad=True)
        with mfa.simulate(family) as simulation:
            mfa.attention(query, query, value, bias, dropout_p=0.5).sum().backward()
        used.update({launch.kernel: launch.threadgroup_memory for launch in simulation.launches})

    before = _library.set_backward_mode(0)
    try:
        families = ("apple7", "apple9", "apple10")
        for family, gemms, bucket in itertools.product(families, (5, 7), [*BUCKETS, LATENT]):
            _library.set_backward_mode(gemms)
            run(family, *bucket)
        for row in rows:  # alternatives
            if row.name not in used:
                _library.prefer_instance(row.name)
                run("apple10" if row.path.startswith("unit") else "apple9", row.head_dim, row.value_dim)
                assert row.name in used
    finally:
        _library.set_backward_mode(before)
        _library.prefer_instance(None)
    assert used == {row.name: row.threadgroup_memory for row in rows}
