"""Cases -> plans: which pipelines run, with which parameters. Needs the package; what it makes is plain data."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mfa import _native

from . import standalone
from .cases import Case

PARAMS = Path(__file__).parents[2] / "metal" / "params.h"


def enumerators(name: str) -> dict[str, int]:
    """`kGradQuery = 14` of an enumeration in metal/params.h as {"grad_query": 14}; `kNewKey = kGradKey` is the same."""
    text = PARAMS.read_text()
    body = text[text.index(f"enum {name}") :]
    values: dict[str, int] = {}
    for each in re.finditer(r"\bk(\w+) = (?:(\d+)|k(\w+))", body[: body.index("};")]):
        values[each[1]] = int(each[2]) if each[2] else values[each[3]]
    return {re.sub(r"(?<!^)([A-Z])", r"_\1", each).lower(): value for each, value in values.items()}


def constant_indices() -> dict[str, int]:
    """As plans spell them: is_aligned for kAligned."""
    irregular = {"aligned": "is_aligned", "exact_head": "is_exact_head"}
    irregular |= {"rotary_interleaved": "is_rotary_interleaved", "rotary_float": "is_rotary_float"}
    return {irregular.get(name, name): index for name, index in enumerators("FunctionConstant").items()}


CONSTANTS = constant_indices()


def strides_of(case: Case, heads: int, length: int, dim: int) -> tuple[int, int, int]:
    """Batch, head, row, in elements."""
    if case.sequences:
        return 0, dim, heads * dim
    if case.interleaved:
        return length * heads * dim, dim, heads * dim
    return heads * length * dim, length * dim, dim


def full_bias_sizes(case: Case) -> tuple[int, ...]:
    own = (case.batch, case.query_heads, case.query_length, case.key_length)
    return tuple(size or full for size, full in zip(case.bias_sizes, own, strict=True))


def problem(case: Case) -> dict[str, Any]:
    """The arguments of _native.plan()."""
    names = "dtype batch query_heads key_heads query_length key_length head_dim window_left window_right"
    fields: dict[str, Any] = {name: getattr(case, name) for name in names.split()}
    fields = {name: value for name, value in fields.items() if value is not None}
    if case.family:
        fields["family"] = case.family
    value_dim = case.value_dim or case.head_dim
    fields |= {"value_dim": value_dim, "scale": case.head_dim**-0.5, "softcap": case.softcap, "has_sinks": case.sinks}
    fields |= {"alibi": "per_head" if case.alibi else "none", "dropout_p": case.dropout_p, "sequences": case.sequences}
    fields["query_strides"] = strides_of(case, case.query_heads, case.query_length, case.head_dim)
    fields["out_strides"] = strides_of(case, case.query_heads, case.query_length, value_dim)
    fields["key_strides"] = strides_of(case, case.key_heads, case.key_length, case.head_dim)
    fields["value_strides"] = strides_of(case, case.key_heads, case.key_length, value_dim)
    if case.bias == "blocks":
        words = len(standalone.block_mask(case.query_length, case.key_length).data)
        fields |= {"bias": "blocks", "bias_words": words}
    elif case.bias != "none":
        sizes = full_bias_sizes(case)
        steps = [sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1]
        fields |= {"bias": case.bias, "bias_sizes": sizes, "bias_strides": tuple(steps)}
    return fields


def cache_fields(case: Case) -> dict[str, Any]:
    """What plan_decode() wants beyond that. A page or an entry is [heads, rows, dim]."""
    rows = case.page_size or case.key_length
    key, value = (case.key_heads * rows * d for d in (case.head_dim, case.value_dim or case.head_dim))
    fields: dict[str, Any] = {
        "key_format": case.cache,
        "value_format": case.cache,
        "splits": case.splits,
        "key_strides": (key, rows * case.head_dim, case.head_dim),
        "value_strides": (value, rows * (case.value_dim or case.head_dim), case.value_dim or case.head_dim),
        "key_scale_strides": (case.key_heads * rows, rows, 1),
        "value_scale_strides": (case.key_heads * rows, rows, 1),
    }
    if case.page_size:
        per_sequence, entries = case.key_length // case.page_size, case.sequences or case.batch
        fields |= {"page_size": case.page_size, "pages": entries * per_sequence, "pages_per_sequence": per_sequence}
    if case.sequences:
        fields["longest_query"] = case.query_length  # which the plan needn't know
    return fields


def as_data(plan: Any) -> dict[str, Any]:
    launches = [
        {
            "kernel": launch.kernel,
            "constants": [CONSTANTS[name] for name, value in launch.constants.items() if value],
            "grid": launch.grid,
            "group": launch.group,
            "unit": launch.unit,
        }
        for launch in plan.launches
    ]
    sizes = {name: getattr(plan, name) for name in ("scratch_bytes", "tile_map_bytes", "mask_class_bytes")}
    splits = {name: getattr(plan.params, name) for name in ("splits", "split_queries")}
    return {"params": bytes(plan.params).hex(), **splits, "launches": launches, **sizes}


def forward_by(name: str, case: Case) -> dict[str, Any]:
    """The plan of forward with an instance that tuning.def needn't choose."""
    found = as_data(_native.plan(**fields_of(case)))
    instance = next(each for each in _native.catalogue() if each.name == name)
    tiles = -(-case.query_length // instance.rows)
    found["launches"][-1] |= {
        "kernel": name,
        "grid": (case.query_heads, tiles, case.batch),
        "group": (32 * instance.simdgroups, 1, 1),
    }
    return found


def direct_instance(case: Case) -> str:
    """The largest tile."""
    found = [
        each
        for each in _native.catalogue()
        if (each.kind, each.path, each.dtype, each.head_dim) == ("forward", "direct", case.dtype, case.head_dim)
    ]
    return str(max(found, key=lambda each: each.rows).name)


def fields_of(case: Case) -> dict[str, Any]:
    has_correction = bool(case.backward) and case.dtype != "f32"
    has_terms = case.sinks or case.alibi or case.bias in ("float32", "same_dtype")
    return problem(case) | {"has_correction": has_correction, "trains_terms": has_correction and has_terms}


def append_fields(case: Case) -> dict[str, Any]:
    """What plan_append() wants beyond that."""
    return {
        "has_lengths": True,
        "tokens": case.new_tokens,
        "has_rotary": case.rotary > 0,
        "rotary_pairs": case.rotary // 2,
        "rotary_positions": case.key_length + case.query_length,
        "rotary_interleaved": case.interleaved,
        "rotary_is_float": True,
    }


def plan(case: Case) -> dict[str, Any]:
    if case.unit_product:
        launch = {"kernel": case.unit_product, "constants": [], "grid": (1, 1, 1), "group": (32, 1, 1)}
        return {"case": asdict(case), "name": case.name, "forward": {"launches": [launch]}}
    if case.new_tokens:
        fields = problem(replace(case, interleaved=False)) | cache_fields(case) | append_fields(case)
        if not case.rotary:
            fields = {name: x for name, x in fields.items() if not name.startswith("rotary_")}
        return {"case": asdict(case), "name": case.name, "forward": as_data(_native.plan_append(**fields))}
    if case.cache:
        return {
            "case": asdict(case),
            "name": case.name,
            "forward": as_data(_native.plan_decode(**problem(case) | cache_fields(case))),
        }
    fields = fields_of(case)
    forward = forward_by(direct_instance(case), case) if case.direct else as_data(_native.plan(**fields))
    found = {"case": asdict(case), "name": case.name, "forward": forward}
    if case.backward:
        wants_bias = case.bias in ("float32", "same_dtype")
        found["backward"] = as_data(
            _native.plan_backward(
                **fields,
                mode=case.backward,
                wants_bias=wants_bias,
                wants_sinks=case.sinks,
                wants_alibi=case.alibi,
                has_grad_lse=case.grad_lse,
                scratch_limit=case.scratch_limit,
            )
        )
    return found
