"""attention_decode in PyTorch's machinery: opcheck, compile, vmap, autocast, FLOPs."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from serving import moved, normal
from test_kv_cache import CACHES, INT32, problem
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import mfa


def op_arguments(**options: Any) -> tuple[Any, ...]:
    named = problem(new=None, **options).arguments()
    caches = (named[name] for name in ("key_cache", "value_cache"))
    scales = (named[name] for name in ("key_scale", "value_scale"))
    table = named.get("block_table")
    terms = (normal(4), normal(3, 4).abs(), 0.25, 20, 0, 5.0, 2)
    mask, leftpad = named.get("attn_mask"), named.get("cache_leftpad")
    return (named["query"], *caches, named["cache_seqlens"], table, *scales, mask, leftpad, *terms)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page": 8},
        {"page": 8, "formats": (torch.int8, torch.int8)},
        {"leftpad": (2, 0, 30), "masked": 0, "formats": (None, torch.int8)},
    ],
)
def test_opcheck(device: Device, options: dict[str, Any]) -> None:
    with device.active():
        opcheck(torch.ops.mfa.attention_decode.default, tuple(moved(x, device) for x in op_arguments(**options)))


def test_the_op_has_no_gradient() -> None:
    query, *rest = op_arguments()
    out, _ = torch.ops.mfa.attention_decode(query.requires_grad_(), *rest)
    with pytest.raises(NotImplementedError, match="attention over a cache has no gradients"):
        out.sum().backward()


def test_bad_contents_are_refused_by_the_op_as_well() -> None:
    tensors = list(op_arguments(page=8))
    tensors[3] = torch.tensor([5, 0, 33], dtype=INT32)
    with pytest.raises(RuntimeError, match="cache_lengths has 33 tokens at 2"):
        torch.ops.mfa.attention_decode(*tensors)


@pytest.mark.parametrize(
    "options",
    [{}, {"page": 8, "formats": (torch.int8, torch.int8)}, {"rows": (1, 0, 3), "masked": 2, "leftpad": (2, 0, 1)}],
)
def test_compile_is_done_once_for_all_lengths(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mfa.attention_with_kv_cache, fullgraph=True, dynamic=True, backend=counter)
    named = problem(lengths=(5, 0, 20), **options).arguments()
    del named["softcap"]  # a float argument becomes a symbol, which torch.compile(dynamic=True) compiles twice for
    if "block_table" in named:
        named["block_table"].copy_(torch.arange(9, dtype=INT32).view(3, 3))
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        if named[name] is not None and named[name].is_floating_point():
            named[name].nan_to_num_()
    other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in named.items()}
    for lengths in ((5, 0, 20), (2, 3, 4), (7, 8, 9)):
        seqlens = {"cache_seqlens": torch.tensor(lengths, dtype=INT32)}
        out = step(**{**named, **seqlens})
        torch.testing.assert_close(out, mfa.attention_with_kv_cache(**{**other, **seqlens}))
        for name in CACHES:
            if named[name] is not None:
                assert torch.equal(named[name], other[name])
    assert counter.frame_count == 1


def test_vmap() -> None:
    query, *rest = op_arguments()
    rest[:2] = [cache.nan_to_num() for cache in rest[:2]]
    queries, lengths = normal(2, *query.shape, seed=9), torch.tensor([[5, 0, 30], [1, 2, 3]], dtype=INT32)

    def f(query: Tensor, lengths: Tensor) -> Tensor:
        return torch.ops.mfa.attention_decode(query, *rest[:2], lengths, *rest[3:])[0]

    expected = [f(q, n) for q, n in zip(queries, lengths, strict=True)]
    torch.testing.assert_close(list(torch.vmap(f)(queries, lengths)), expected)


@pytest.mark.parametrize("formats", [(None, None), (torch.int8, None), (torch.int8, torch.int8)])
def test_autocast(formats: tuple[torch.dtype | None, torch.dtype | None]) -> None:
    """A cache isn't cast: what meets it is."""
    named = problem(dtype=torch.float16, formats=formats).arguments()
    for name in ("query", "key", "value"):
        named[name] = named[name].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mfa.attention_with_kv_cache(**named)
    assert out.dtype == (torch.float16 if None in formats else torch.bfloat16)


def test_flops_are_those_of_the_live_keys() -> None:
    named = problem().arguments()
    with FlopCounterMode(display=False) as counter:
        mfa.attention_with_kv_cache(**named)
    assert counter.get_total_flops() == 2 * 4 * 2 * (35 + 6) * 32
