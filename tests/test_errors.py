"""Every refusal of the error table: the class, and a sentence that names the argument and what it must be."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIMULATOR, Device
from torch import Tensor

import mfa

SHAPES = {"query": (2, 4, 5, 16), "key": (2, 4, 7, 16), "value": (2, 4, 7, 16)}


def arguments(**changes: Any) -> dict[str, Any]:
    """Good arguments with some replaced; a tuple for query, key or value is a shape."""
    tensors = {**SHAPES, **{name: changes.pop(name) for name in SHAPES if name in changes}}
    made = {name: torch.randn(value) if isinstance(value, tuple) else value for name, value in tensors.items()}
    return {**made, **changes}


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


half = ones(2, 4, 7, 16, dtype=torch.float16)
SHAPES_AND_VALUES = {
    "rank 2": ({"query": (5, 16)}, "query has 2 dimensions; it must have 3 or 4"),
    "rank 5": ({"value": (1, 2, 4, 7, 16)}, "value has 5 dimensions; it must have 3 or 4"),
    "batch": ({"key": (3, 4, 7, 16)}, "key has batch size 3; it must be 1 or that of query, 2"),
    "batch of value": ({"value": (3, 4, 7, 16)}, "value has batch size 3; it must be 1 or that of query, 2"),
    "heads": (
        {"key": (2, 2, 7, 16), "value": (2, 2, 7, 16)},
        "key has 2 heads; it must have 1, or those of query, 4, unless enable_gqa is True",
    ),
    "grouped heads": (
        {"key": (2, 3, 7, 16), "value": (2, 3, 7, 16), "enable_gqa": True},
        "query has 4 heads; it must have a multiple of those of key, 3",
    ),
    "no key heads": (
        {"key": (2, 0, 7, 16), "value": (2, 0, 7, 16), "enable_gqa": True},
        "query has 4 heads; it must have a multiple of those of key, 0",
    ),
    "heads of value": (
        {"key": (2, 2, 7, 16), "enable_gqa": True},
        "value has 4 heads; it must have 1, or those of key, 2",
    ),
    "length of value": ({"value": (2, 4, 8, 16)}, "value has length 8; it must have that of key, 7"),
    "head dimension": ({"key": (2, 4, 7, 24)}, "key has head dimension 24; it must have that of query, 16"),
    "head dimension 0": (
        {"query": (2, 4, 5, 0), "key": (2, 4, 7, 0)},
        "query has head dimension 0; it must be within 1 ... 512",
    ),
    "value dimension 0": ({"value": (2, 4, 7, 0)}, "value has head dimension 0; it must be within 1 ... 512"),
    "mask": (
        {"attn_mask": ones(5, 8)},
        "attn_mask has shape [5, 8]; it must broadcast to [B,Hq,Lq,Lk] = [2, 4, 5, 7]",
    ),
    "mask of rank 5": (
        {"attn_mask": ones(1, 2, 4, 5, 7)},
        "attn_mask has shape [1, 2, 4, 5, 7]; it must broadcast to [B,Hq,Lq,Lk] = [2, 4, 5, 7]",
    ),
    "sinks": ({"sinks": ones(3)}, "sinks has shape [3]; it must have shape [Hq] = [4]"),
    "sinks of rank 2": ({"sinks": ones(2, 4)}, "sinks has shape [2, 4]; it must have shape [Hq] = [4]"),
    "slopes": (
        {"alibi_slopes": ones(4, 2)},
        "alibi_slopes has shape [4, 2]; it must have shape [Hq] = [4] or [B,Hq] = [2, 4]",
    ),
    "dropout 1": ({"dropout_p": 1.0}, "dropout_p is 1.0; it must be within [0, 1)"),
    "dropout below 0": ({"dropout_p": -0.1}, "dropout_p is -0.1; it must be within [0, 1)"),
    "dropout nan": ({"dropout_p": math.nan}, "dropout_p is nan; it must be within [0, 1)"),
    "scale nan": ({"scale": math.nan}, "scale is nan; it must be a number"),
    "softcap below 0": ({"softcap": -1.0}, "softcap is -1.0; it must be 0 (off) or more, and finite"),
    "softcap nan": ({"softcap": math.nan}, "softcap is nan; it must be 0 (off) or more, and finite"),
    "softcap inf": ({"softcap": math.inf}, "softcap is inf; it must be 0 (off) or more, and finite"),
    "huge window": (
        {"window": (2**63, None)},
        f"window is ({2**63}, None); its entries must be within -2^62 ... 2^62, or None for open",
    ),
    "device": (
        {"key": torch.empty(2, 4, 7, 16, device="meta")},
        "key is on meta; it must be on the device of query, cpu",
    ),
    "device of mask": (
        {"attn_mask": torch.empty(5, 7, device="meta")},
        "attn_mask is on meta; it must be on the device of query, cpu",
    ),
    "device of sinks": (
        {"sinks": torch.empty(4, device="meta")},
        "sinks is on meta; it must be on the device of query, cpu",
    ),
}
DTYPES_AND_TYPES = {
    "dtype of query": (
        {name: ones(2, 4, 7, 16, dtype=torch.int32) for name in SHAPES},
        "query has dtype int32; it must be float16, bfloat16, float32 or float64",
    ),
    "complex": (
        {name: ones(2, 4, 7, 16, dtype=torch.complex64) for name in SHAPES},
        "query has dtype complex64; it must be float16, bfloat16, float32 or float64",
    ),
    "dtype of key": ({"key": half}, "key has dtype float16; it must have that of query, float32"),
    "dtype of value": ({"value": half}, "value has dtype float16; it must have that of query, float32"),
    "dtype of mask": (
        {"attn_mask": ones(5, 7, dtype=torch.float16)},
        "attn_mask has dtype float16; it must be bool or float32",
    ),
    "dtype of mask with half": (
        dict.fromkeys(SHAPES, half) | {"attn_mask": ones(7, 7, dtype=torch.int64)},
        "attn_mask has dtype int64; it must be bool, float32 or float16",
    ),
    "dtype of sinks": ({"sinks": ones(4, dtype=torch.float16)}, "sinks has dtype float16; it must be float32"),
    "dtype of slopes": (
        {"alibi_slopes": ones(4, dtype=torch.float64)},
        "alibi_slopes has dtype float64; it must be float32",
    ),
    "not a tensor": ({"query": [1.0]}, "query is of type list; it must be a tensor"),
    "mask that is no tensor": ({"attn_mask": 1.0}, "attn_mask is of type float; it must be a tensor"),
    "flag": ({"is_causal": 1}, "is_causal is 1; it must be True or False"),
    "scale": ({"scale": "1"}, "scale is '1'; it must be a number"),
    "softcap": ({"softcap": True}, "softcap is True; it must be a number"),
    "window": ({"window": 3}, "window is 3; it must be a pair (left, right)"),
    "window of 3": ({"window": (1, 2, 3)}, "window is (1, 2, 3); it must be a pair (left, right)"),
    "window of arrays": ({"window": (np.arange(2), np.arange(2))}, "window is (array([0, 1]), array([0, 1])); its ent"),
    "window, an array": ({"window": np.arange(2)}, "window is array([0, 1]); it must be a pair (left, right)"),
    "window of floats": ({"window": (1.0, None)}, "window is (1.0, None); its entries must be integers or None"),
}
NOT_SUPPORTED = {
    "head dimension": (
        {"query": (2, 4, 5, 513), "key": (2, 4, 7, 513)},
        "query has head dimension 513; it must be within 1 ... 512: use torch.nn.functional",
    ),
    "value dimension": ({"value": (2, 4, 7, 600)}, "value has head dimension 600; it must be within 1 ... 512: use"),
    "MLA's head dimension with another value's": (
        {"query": (2, 4, 5, 576), "key": (2, 4, 7, 576)},
        "query has head dimension 576; it must be within 1 ... 512: use torch.nn.functional",
    ),
    "sparse": ({"key": torch.eye(7).to_sparse()}, "key has layout sparse_coo; only strided tensors are supported"),
    "sparse mask": (
        {"attn_mask": torch.eye(5, 7).to_sparse()},
        "attn_mask has layout sparse_coo; only strided tensors are supported: use to_dense()",
    ),
    "nested": (
        {"query": torch.nested.nested_tensor([ones(4, 3, 16), ones(4, 5, 16)], layout=torch.jagged)},
        "query has layout nested; only strided tensors are supported",
    ),
}
CASES = [
    *((ValueError, *case) for case in SHAPES_AND_VALUES.values()),
    *((TypeError, *case) for case in DTYPES_AND_TYPES.values()),
    *((NotImplementedError, *case) for case in NOT_SUPPORTED.values()),
]
NAMES = [*SHAPES_AND_VALUES, *DTYPES_AND_TYPES, *NOT_SUPPORTED]
# What mfa::attention has an argument for, of a type that its schema lets through.
OP_CASES = {
    name: case[1:]
    for name, case in zip(NAMES, CASES, strict=True)
    if not any(argument in case[1] for argument in ("sinks", "alibi_slopes", "softcap", "window"))
    and case[2].partition(" is ")[2].split("; ")[0] not in ("of type list", "of type float", "1", "'1'")
}


@pytest.mark.parametrize(("error", "changes", "sentence"), CASES, ids=NAMES)
@pytest.mark.parametrize("kind", ["cpu", SIMULATOR])
def test_function(error: type[Exception], changes: dict[str, Any], sentence: str, kind: str) -> None:
    with Device(kind).active(), pytest.raises(error) as raised:
        mfa.attention(**arguments(**changes))
    assert type(raised.value) is error
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(("changes", "sentence"), OP_CASES.values(), ids=OP_CASES)
def test_op(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ops.mfa.attention(**arguments(**changes))
    assert str(raised.value).startswith(sentence)


FORWARD = {
    "rank": ({"query": (4, 5, 16)}, "query has 3 dimensions; it must have 4"),
    "batch": ({"key": (1, 4, 7, 16)}, "key has batch size 1; it must be that of query, 2"),
    "bias of rank 2": ({"bias": ones(5, 7)}, "bias has 2 dimensions; it must have 4"),
    "bias": ({"bias": ones(1, 3, 5, 7)}, "bias has shape [1, 3, 5, 7]; it must broadcast to"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0; it must be 0 (off) or more"),
    "dropout without state": ({"dropout_p": 0.5}, "rng_state is None; it must be a tensor, since dropout_p is 0.5"),
    "state without dropout": (
        {"rng_state": ones(2, dtype=torch.int64)},
        "rng_state is given; it must be None, since dropout_p is 0.0",
    ),
    "dtype of state": (
        {"dropout_p": 0.5, "rng_state": ones(2, dtype=torch.int32)},
        "rng_state has dtype int32; it must be int64",
    ),
    "shape of state": (
        {"dropout_p": 0.5, "rng_state": ones(3, dtype=torch.int64)},
        "rng_state has shape [3]; it must have shape [2]",
    ),
    "slopes": ({"alibi_slopes": ones(3)}, "alibi_slopes has shape [3]; it must have shape [Hq] = [4] or [B,Hq]"),
    "block mask and bias": (
        {"bias": ones(1, 1, 5, 7), "block_mask": ones(16, dtype=torch.int32)},
        "bias and block_mask are both given; at most one may be",
    ),
    "dtype of block mask": ({"block_mask": ones(16)}, "block_mask has dtype float32; it must be int32"),
    "shape of block mask": (
        {"block_mask": ones(4, 4, dtype=torch.int32)},
        "block_mask has shape [4, 4]; it must be what pack_block_mask makes",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("kind", ["cpu", SIMULATOR, "meta"])
def test_forward_op(changes: dict[str, Any], sentence: str, kind: str) -> None:
    good = {"bias": None, "sinks": None, "alibi_slopes": None, "scale": 1.0, "window_left": None, "window_right": None}
    made = arguments(**{**good, "softcap": 0.0, "dropout_p": 0.0, "rng_state": None, "block_mask": None, **changes})
    if kind == "meta":
        made = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in made.items()}
    with Device(kind).active(), pytest.raises(RuntimeError) as raised:
        torch.ops.mfa.attention_forward(**made)
    assert str(raised.value).startswith(sentence)


@pytest.mark.simulator
def test_float64_in_the_simulator() -> None:
    tensors = {name: ones(*shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with mfa.simulate(), pytest.raises(TypeError, match=r"^query has dtype float64; it must be float16, bfloat16 or"):
        mfa.attention(**tensors)


def test_an_unsupported_device_is_named() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {name: torch.empty(shape, device="cuda") for name, shape in SHAPES.items()}
        with pytest.raises(NotImplementedError, match=r"^query is on cuda:0; only mps and cpu tensors are supported"):
            mfa.attention(**tensors)
