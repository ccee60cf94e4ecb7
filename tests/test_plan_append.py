"""plan_append(): one launch, of a SIMD-group per row."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfa import _native as native

CATALOGUE = {row.name: row for row in native.catalogue()}
FORMATS = ("same_dtype", "int8", "e4m3", "e5m2")
BASE: dict[str, Any] = {
    **{"batch": 3, "query_heads": 8, "key_heads": 2, "query_length": 2, "key_length": 64, "head_dim": 64},
    **{"value_dim": 64, "tokens": 2},
}
ROTARY: dict[str, Any] = {"has_rotary": True, "rotary_pairs": 16, "rotary_positions": 100}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    key_heads = draw(st.integers(0, 4))
    capacity = draw(st.integers(0, 100))
    problem = {
        "dtype": draw(st.sampled_from(("f16", "bf16", "f32"))),
        "batch": draw(st.integers(0, 4)),
        "query_heads": key_heads * draw(st.integers(0, 4)),
        "key_heads": key_heads,
        "query_length": draw(st.integers(0, 40)),
        "key_length": capacity,
        "head_dim": draw(st.integers(1, 256)),
        "value_dim": draw(st.integers(1, 256)),
        "has_lengths": draw(st.booleans()),
        "length": draw(st.integers(0, capacity)),
        "tokens": draw(st.integers(0, capacity)),
        "key_format": draw(st.sampled_from(FORMATS)),
        "value_format": draw(st.sampled_from(FORMATS)),
    }
    if draw(st.booleans()):
        problem |= {"page_size": 16, "pages": 9, "pages_per_sequence": 7}
    if draw(st.booleans()):
        flags = ("rotary_has_starts", "rotary_interleaved", "rotary_is_float", "queries_advance")
        problem |= {"has_rotary": True, "rotary_positions": draw(st.integers(1, 200))}
        problem |= {"rotary_pairs": draw(st.integers(0, problem["head_dim"] // 2))}
        problem |= {flag: draw(st.booleans()) for flag in flags}
    return problem


@given(problems())
def test_every_row_has_a_simdgroup(problem: dict[str, Any]) -> None:
    plan = native.plan_append(**problem)
    assert len(plan.launches) == (problem["batch"] > 0)  # the lengths are written even if nothing is appended
    for launch in plan.launches:
        row = CATALOGUE[launch.kernel]
        assert (row.kind, row.dtype, row.head_dim) == ("append", problem["dtype"], 0)
        rows = 2 * problem["key_heads"] * problem["tokens"]
        rows += problem["query_heads"] * problem["query_length"] if problem.get("has_rotary") else 0
        assert launch.grid == (max(1, math.ceil(rows / row.simdgroups)), problem["batch"], 1)
        assert launch.group == (32 * row.simdgroups, 1, 1)


@given(problems())
def test_constants(problem: dict[str, Any]) -> None:
    for launch in native.plan_append(**problem).launches:
        used = {name for name, value in launch.constants.items() if value} - {"is_aligned"}
        expected = {"is_paged"} if problem.get("page_size") else set()
        expected |= {"has_key_lengths"} if problem["has_lengths"] else set()
        for side in ("key", "value"):
            form = problem[f"{side}_format"]
            expected |= {f"{side}_is_quantized"} if form != "same_dtype" else set()
            expected |= {f"{side}_is_{form}"} if form in ("int8", "e5m2") else set()
        if problem.get("has_rotary"):
            of_flags = {"has_starts": "has_rotary_seqlens", "interleaved": "is_rotary_interleaved"}
            of_flags |= {"is_float": "is_rotary_float"}
            expected |= {"has_rotary"} | {name for flag, name in of_flags.items() if problem[f"rotary_{flag}"]}
        assert used == expected


@pytest.mark.parametrize("tensor", ["query", "key", "value", "out", "new_key", "new_value"])
def test_one_odd_stride_spoils_the_alignment(tensor: str) -> None:
    def is_aligned(**more: Any) -> bool:
        [launch] = native.plan_append(**{**BASE, **ROTARY, **more}).launches
        return launch.constants["is_aligned"]

    assert is_aligned()
    for dimension in range(3):
        strides = [512, 128, 64]
        strides[dimension] += 4
        assert not is_aligned(**{f"{tensor}_strides": tuple(strides)})
    assert not is_aligned(aligned=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 65}, "tokens must be within"),
        ({"length": 65}, "length must be within"),
        ({"rotary_pairs": 33}, "rotary.pairs must be within 0 ... head_dim"),
    ],
)
def test_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        native.plan_append(**{**BASE, **ROTARY, **change})
