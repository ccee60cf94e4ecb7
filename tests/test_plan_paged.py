"""Plans of packed queries over pages: every row has a tile, every part has room, few launches."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_problems import CATALOGUE, DTYPES, FAMILIES, bucket, dims, tiles

from mfa import _native as native


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """And the queries of each sequence, which the plan doesn't get."""
    lengths = draw(st.lists(st.integers(0, 300) | st.sampled_from((1, 8, 9, 64, 2**20)), min_size=1, max_size=40))
    page, width = 8 * draw(st.integers(1, 32)), draw(st.integers(1, 4096))
    key_heads = draw(st.integers(1, 16))
    problem = {
        "family": draw(st.sampled_from(FAMILIES)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "batch": 1,
        "sequences": len(lengths),
        "longest_query": max(lengths) + draw(st.sampled_from((0, 0, 1, 10**6))),
        "key_heads": key_heads,
        "query_heads": key_heads * draw(st.integers(1, 16)),
        "query_length": sum(lengths) + draw(st.sampled_from((0, 0, 100))),
        "key_length": page * width,
        "head_dim": draw(dims),
        "value_dim": draw(dims),
        "window_right": draw(st.none() | st.just(0)),
        "page_size": page,
        "pages": draw(st.integers(1, 1000)),
        "pages_per_sequence": width,
        "key_format": draw(st.sampled_from(("same_dtype", "int8", "e4m3", "e5m2"))),
        "splits": draw(st.sampled_from((0, 0, 1, 7))),
    }
    return problem, lengths


@given(problems())
def test_plans(given_problem: tuple[dict[str, Any], list[int]]) -> None:
    problem, lengths = given_problem
    plan = native.plan_decode(**problem)
    if min(problem["longest_query"], problem["query_length"]) == 0:
        assert not plan.launches
        return
    tile_map, decode, *combine = plan.launches
    row, group = CATALOGUE[decode.kernel], problem["query_heads"] // problem["key_heads"]
    assert (row.kind, row.dtype, (row.head_dim, row.value_dim)) == ("decode", problem["dtype"], bucket(problem))
    entries = decode.grid[0] // problem["key_heads"]
    assert decode.grid == (problem["key_heads"] * entries, plan.params.splits, 1)
    assert sum(tiles(length * group, row.rows) for length in lengths) <= entries
    assert tile_map.kernel == "tile_map_of_packed_s8"
    assert tile_map.unit == (row.rows, entries)
    assert plan.tile_map_bytes == 8 * entries
    constants = {name for name, value in decode.constants.items() if value}
    assert {"is_varlen", "has_key_lengths", "is_paged", "writes_lse"} <= constants
    assert "has_key_starts" not in constants
    parts = plan.params.splits
    assert parts * plan.params.split_keys >= problem["key_length"] > (parts - 1) * plan.params.split_keys
    assert bool(combine) == ("is_split" in constants) == (parts > 1)
    if combine:
        rows = problem["sequences"] * problem["query_heads"] * plan.params.split_queries
        assert plan.partial_lse_bytes == 4 * parts * rows
        assert plan.partial_out_bytes == plan.partial_lse_bytes * problem["value_dim"]
        assert plan.params.split_queries * group <= max(128, group)
        assert combine[0].grid[0] * 128 >= rows * tiles(problem["value_dim"], 8)


@pytest.mark.parametrize(("sequences", "entries"), [(1, 1), (8, 8), (300, 300)])
def test_decoding_alone_has_no_idle_tiles(sequences: int, entries: int) -> None:
    """One query per sequence: as many tiles as sequences."""
    problem = {"sequences": sequences, "longest_query": 1, "query_length": sequences, "key_length": 4096}
    problem |= {"page_size": 16, "pages": 10, "pages_per_sequence": 256, "query_heads": 24, "key_heads": 8}
    decode = native.plan_decode(batch=1, head_dim=128, value_dim=128, **problem).launches[1]
    assert decode.grid[0] == 8 * entries
