"""mfa::attention_append in PyTorch's machinery, what it refuses, and mfa.attention_with_kv_cache on top of it."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from appending import CACHES, CPU, INT32, QUANTIZED, as_args, assert_same_bits, call, problem
from conftest import Device
from serving import moved
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import mfa


@pytest.mark.parametrize(
    "options",
    [{}, {"page": 8, "formats": (torch.int8,) * 2, "own_starts": True}, {"rotary": None, "transposed": (True, True)}],
)
def test_opcheck(device: Device, options: dict[str, Any]) -> None:
    named = problem(dtype=torch.float32, **options).arguments()
    with device.active():
        opcheck(torch.ops.mfa.attention_append.default, tuple(moved(x, device) for x in as_args(named)))


def test_it_counts_as_a_change_in_place() -> None:
    named = problem(formats=QUANTIZED).arguments()
    before = {name: named[name]._version for name in CACHES}
    torch.ops.mfa.attention_append(*as_args(named))
    assert all(named[name]._version > before[name] for name in CACHES)
    weight = torch.ones(3, 2, 17, 16, requires_grad=True)
    named = problem(dtype=torch.float32, rotary=None).arguments()
    product = (weight * named["key_cache"]).sum()
    torch.ops.mfa.attention_append(*as_args(named))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", ["query", "key_cache", "key", "value", "rotary_cos"])
def test_it_has_no_gradient(name: str) -> None:
    named = problem().arguments()
    kept = named["key_cache"].clone()
    named[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, and attention over a cache has no gradients"):
        torch.ops.mfa.attention_append(*as_args(named))
    assert torch.equal(named["key_cache"], kept)
    with torch.no_grad():
        torch.ops.mfa.attention_append(*as_args(named))
    assert not torch.equal(named["key_cache"], kept)


def test_inference_mode() -> None:
    with torch.inference_mode():
        named = problem().arguments()
        torch.ops.mfa.attention_append(*as_args(named))


def test_vmap_is_refused() -> None:
    named = problem().arguments()
    keys = named["key"].expand(2, *named["key"].shape)

    def append(key: Tensor) -> Tensor:
        return torch.ops.mfa.attention_append(*as_args({**named, "key": key}))[1]

    with pytest.raises(NotImplementedError, match=r"can't be appended to a cache inside torch\.vmap"):
        torch.vmap(append)(keys)


def test_autocast() -> None:
    named = problem(dtype=torch.bfloat16).arguments()
    wide = {name: named[name].float() for name in ("query", "key", "value")}
    expected, results = call(named, CPU)
    with torch.autocast("cpu", dtype=torch.float16):  # a cache isn't cast: what meets it is
        after, found = call({**named, **wide}, CPU)
    for actual, wanted in zip(found, results, strict=True):
        assert_same_bits(actual, wanted)
    assert_same_bits(after["key_cache"], expected["key_cache"])


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"cache_lengths": torch.tensor([5, 0, 16], dtype=INT32)}, "cache_lengths has 16 and 2 new tokens at 2"),
    ({}, {"cache_lengths": torch.tensor([5, 0])}, "cache_lengths has dtype int64"),
    ({}, {"cache_lengths": None, "cache_length": 16}, "cache_length has 16 and 2 new tokens at 0"),
    ({"page": 8}, {"block_table": torch.zeros(3, 3, dtype=INT32)}, "append to the same slot"),
    ({"page": 8}, {"block_table": torch.full((3, 3), 11, dtype=INT32)}, "has page 11 at"),
    ({"formats": QUANTIZED}, {"value_scale": None}, "value_scale is None"),
    ({}, {"key": torch.zeros(3, 2, 2, 8).half()}, "key has shape"),
    ({}, {"value": torch.zeros(3, 2, 2, 16)}, "value has dtype float32"),
    ({}, {"rotary_sin": None}, "rotary_sin is None, and rotary_cos is given"),
    ({}, {"rotary_sin": torch.zeros(22, 3)}, r"rotary_sin has shape \[22, 3\]; it must have that of rotary_cos"),
    ({}, {"rotary_sin": torch.zeros(22, 4).half()}, "rotary_sin has dtype float16; it must have that of rotary_cos"),
    ({}, {"rotary_cos": torch.zeros(22, 4).int()}, "rotary_cos has dtype int32; it must be float16 or float32"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(22, 9)), "rotary_cos has 9 columns; .* half of .* 16"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(13, 4)), "13 positions; .* 2 tokens from 12 on"),
    ({}, dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(0, 4)), "rotary_cos has 0 positions"),
    ({}, {"rotary_seqlens": torch.tensor([0, 21, 0], dtype=INT32)}, "2 tokens from 21 on, for batch entry 1"),
    ({}, {"rotary_seqlens": torch.tensor([0, -1, 0], dtype=INT32)}, "2 tokens from -1 on"),
    (
        {"rotary": None},
        {"rotary_seqlens": torch.zeros(3, dtype=INT32)},
        "rotary_seqlens is given, and rotary_cos is None",
    ),
]


@pytest.mark.parametrize(("options", "change", "words"), BAD)
def test_a_failed_check_leaves_the_cache(
    device: Device, options: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    if device.name == "mps" and any(word in words for word in ("slot", "page 11", "tokens")):
        pytest.skip("the host doesn't see contents there")
    named = problem(**options).arguments()
    there = {name: moved(x, device) for name, x in {**named, **change}.items()}
    kept = {name: there[name].clone() for name in CACHES if there[name] is not None}
    with (
        device.active(),
        pytest.raises(RuntimeError, match=None if device.name == "mps" else words),
    ):  # C++ says it there
        torch.ops.mfa.attention_append(*as_args(there))
    for name, cache in kept.items():
        assert_same_bits(there[name], cache)


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda named: {"key_cache": named["key_cache"].mT.contiguous().mT}, "key_cache must have a contiguous last"),
        (lambda named: {"value_cache": named["value_cache"][:1].expand(3, -1, -1, -1)}, "value_cache is expanded"),
    ],
)
def test_what_kernels_cant_write_is_refused_before_anything_is_written(change: Any, words: str) -> None:
    named = problem().arguments()
    named |= change(named)
    kept = {name: named[name].clone() for name in CACHES[:2]}
    with mfa.simulate(), pytest.raises(RuntimeError, match=words):
        torch.ops.mfa.attention_append(*as_args(named))
    for name, cache in kept.items():
        assert_same_bits(named[name], cache)


# -- mfa.attention_with_kv_cache ------------------------------------------------------------------------------------


def public(named: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of the function."""
    names = ("cache_lengths", "cache_length", "rotary_seqlens", "queries_advance")
    kept = {name: x for name, x in named.items() if name not in names}
    lengths = named["cache_length"] if named["cache_lengths"] is None else named["cache_lengths"]
    return {**kept, "cache_seqlens": lengths, **more}


@pytest.mark.parametrize("terms", [{}, {"is_causal": False, "window": (3, None)}, {"is_causal": False}])
def test_rotary_of_the_function(device: Device, terms: dict[str, Any]) -> None:
    """As with queries and keys that are rotated already."""
    named = problem(interleaved=True, advance=terms != {"is_causal": False}).arguments()
    after, (query, _) = call(named, CPU)
    first = {name: moved(x, device) for name, x in public(named, **terms).items()}
    plain = dict.fromkeys(("rotary_cos", "rotary_sin"))
    second = public(named, **terms) | plain | {"query": query, "key_cache": after["key_cache"]}
    second |= {"value_cache": after["value_cache"], "key": None, "value": None}
    second |= {"cache_seqlens": named["cache_lengths"] + 2, "rotary_interleaved": False}
    second = {name: moved(x, device) for name, x in second.items()}
    with device.active():
        out, expected = (mfa.attention_with_kv_cache(**arguments) for arguments in (first, second))
    assert_same_bits(out.cpu(), expected.cpu())
    assert_same_bits(first["key_cache"].cpu(), after["key_cache"])


class Dispatched(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.simulator
@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("formats", [(None, None), (torch.int8, torch.int8)])
@pytest.mark.parametrize(("rotary", "as_number"), [(None, False), (16, False), (8, True)])
def test_two_launches_from_query_key_value_to_out(
    page: int | None, formats: tuple[torch.dtype | None, ...], rotary: int | None, as_number: bool
) -> None:
    options = {"as_number": True, "lengths": (5, 5, 5)} if as_number else {}
    named = public(problem(page=page, formats=formats, rotary=rotary, spare=60, **options).arguments())
    with Dispatched() as dispatched, mfa.simulate() as simulation:
        mfa.attention_with_kv_cache(**named)
        mfa.attention_with_kv_cache(**named, num_splits=2)
    kernels = [launch.kernel.split("_")[0] for launch in simulation.launches]
    assert kernels == ["append", "decode", "append", "decode", "combine"]
    names = [name for name in dispatched.names if name != "aten.view.default"]  # where the host reads the block table
    assert names == ["mfa.attention_append.default", "mfa.attention_decode.default"] * 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": None, "value": None}, ValueError, "key is None, and rotary_cos is given"),
        ({"rotary_cos": None}, ValueError, "rotary_cos is None, and rotary_sin is given"),
        ({"rotary_cos": [1]}, TypeError, "rotary_cos is of type list"),
        ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved is 1; it must be True or False"),
        ({"cache_seqlens": 14, "query": torch.zeros(3, 4, 9, 16).half()}, ValueError, "9 tokens from 14 on"),
    ],
)
def test_the_function_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    named = public(problem().arguments())
    kept = named["key_cache"].clone()
    with pytest.raises(error, match=words):
        mfa.attention_with_kv_cache(**{**named, **change})
    assert_same_bits(named["key_cache"], kept)


def test_compile_is_done_once_for_all_lengths_and_numbers_of_tokens() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mfa.attention_with_kv_cache, fullgraph=True, dynamic=True, backend=counter)
    for new in (5, 6, 7):
        named = public(problem(dtype=torch.float32, new=new, query_length=new, spare=9 - new).arguments())
        other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
        torch.testing.assert_close(step(**named), mfa.attention_with_kv_cache(**other))
        for name in CACHES[:2]:
            assert_same_bits(named[name], other[name])
    assert counter.frame_count == 1


def test_export() -> None:
    class Step(torch.nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, n: Tensor) -> Tensor:
            return mfa.attention_with_kv_cache(query, keys, values, key, value, cache_seqlens=n)

    named = problem(dtype=torch.float32, rotary=None).arguments()
    names = ("query", "key_cache", "value_cache", "key", "value", "cache_lengths")
    program = torch.export.export(Step(), tuple(named[name].clone() for name in names))
    results = []
    for function in (Step(), program.module()):
        args = tuple(named[name].clone() for name in names)
        results.append((function(*args), *args))
    torch.testing.assert_close(*results)
