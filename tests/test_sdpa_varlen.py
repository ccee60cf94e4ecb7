"""torch.nn.attention.varlen.varlen_attn by mfa: the aten ops behind it."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Device
from oracle import attention, composition, largest_error, tolerance
from sdpa_cases import Inputs, check_nothing_active, random  # noqa: F401 (fixtures)
from torch import Tensor

from mfa import sdpa


@pytest.fixture
def varlen() -> Any:
    from torch.nn.attention import varlen

    return varlen


LENGTHS = [3, 0, 7, 20]


def options(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Keyword arguments as this torch's function has them; skips what it doesn't have."""
    known = inspect.signature(function).parameters
    if "window_size" not in known and wanted.get("window_size") in ((-1, -1), (-1, 0)):  # torch 2.10
        wanted["is_causal"] = wanted.pop("window_size")[1] == 0
    missing = sorted(wanted.keys() - known.keys())
    if missing:
        pytest.skip(f"varlen_attn of torch {torch.__version__} has no {missing}")
    return wanted


def packed(device: Device, heads: int = 2) -> tuple[Inputs, Tensor]:
    torch.manual_seed(0)
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = tuple(random(sum(LENGTHS), heads, 16, dtype=torch.float16, device=device.type) for _ in range(3))
    return inputs, starts.to(device.type)  # type: ignore[return-value]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
def test_varlen_attn(device: Device, varlen: Any, window: tuple[int, int]) -> None:
    inputs, starts = packed(device)
    terms = options(varlen.varlen_attn, return_aux=varlen.AuxRequest(lse=True), window_size=window)
    with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
        out, lse = varlen.varlen_attn(*inputs, starts, starts, 20, 20, **terms)
        if hasattr(varlen, "varlen_attn_out"):  # torch 2.12 on
            again = torch.empty_like(out)
            varlen.varlen_attn_out(again, *inputs, starts, starts, 20, 20, window_size=window)
            assert torch.equal(out, again)
    bounds = tuple(None if bound < 0 else bound for bound in window)
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        one = [tensor[start:end].transpose(0, 1).unsqueeze(0).cpu() for tensor in inputs]
        if start == end:
            continue
        expected, expected_lse = attention(*one, window=bounds)
        plain, plain_lse = composition(*one, window=bounds)
        mine = out[start:end].transpose(0, 1).unsqueeze(0).cpu()
        assert largest_error(mine, expected) <= tolerance(plain, expected)
        assert largest_error(lse[None, :, start:end].cpu(), expected_lse) <= tolerance(plain_lse, expected_lse)


def sequences(attend: Any, tensors: Inputs, starts: Tensor) -> Tensor:
    """Causal attention of each sequence by the oracle, or the composition, packed again."""
    parts = []
    for start, end in itertools.pairwise(starts.tolist()):
        if start < end:
            one = [tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in tensors]
            parts.append(attend(*one, window=(None, 0))[0].squeeze(0).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_varlen_attn_backward(device: Device, varlen: Any, key_heads: int) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total, grad = sum(LENGTHS), random(sum(LENGTHS), 4, 16)
    inputs = (random(total, 4, 16), random(total, key_heads, 16), random(total, key_heads, 16))
    leaves = [tensor.to(device.type).requires_grad_() for tensor in inputs]
    on_device = starts.to(device.type)
    grouped = {"enable_gqa": True} if key_heads != 4 else {}
    terms = options(varlen.varlen_attn, window_size=(-1, 0), **grouped)
    with device.active(), sdpa.enabled(cpu=device.name == "cpu"):
        out = varlen.varlen_attn(*leaves, on_device, on_device, 20, 20, **terms)
        grads = torch.autograd.grad(out, leaves, grad.to(device.type))
    wanted = []
    for attend, dtype in ((composition, torch.float32), (attention, torch.float64)):
        copies = tuple(tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs)
        theirs = sequences(attend, copies, starts)  # type: ignore[arg-type]
        wanted.append((theirs, *torch.autograd.grad(theirs, copies, grad.to(theirs.dtype))))
    for i, (mine, plain, exact) in enumerate(zip((out, *grads), *wanted, strict=True)):
        assert largest_error(mine.detach().cpu(), exact) <= tolerance(plain, exact, gradient=i > 0)


def test_varlen_attn_compiled(varlen: Any) -> None:
    inputs, starts = packed(Device("cpu"))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    terms = options(varlen.varlen_attn, window_size=(-1, 0))
    with sdpa.enabled(cpu=True):
        compiled = torch.compile(varlen.varlen_attn, fullgraph=True, backend="aot_eager")
        results = []
        for function in (varlen.varlen_attn, compiled):
            out = function(*leaves, starts, starts, 20, 20, **terms)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 4, 2)])
def test_varlen_attn_caches(varlen: Any, device: Device, lengths: tuple[int, ...]) -> None:
    """One query, or several, for each of three caches, in slots and in pages."""
    torch.manual_seed(0)
    used, slot, page = torch.tensor([5, 4, 16], dtype=torch.int32), 16, 8
    query, (key, value) = random(sum(lengths), 4, 16), (random(3 * slot, 2, 16) for _ in range(2))
    query_starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    starts = torch.arange(0, 49, slot, dtype=torch.int32)
    pages = torch.tensor([[4, -1], [0, 99], [2, 3]], dtype=torch.int32)  # two are not needed
    pools = [torch.full((6, page, 2, 16), torch.nan) for _ in range(2)]
    for row, length in enumerate(used.tolist()):
        for token in range(length):
            for pool, tensor in zip(pools, (key, value), strict=True):
                pool[pages[row, token // page], token % page] = tensor[row * slot + token]
    terms = options(varlen.varlen_attn, enable_gqa=True, seqused_k=used.to(device.type), window_size=(-1, 0))
    options(varlen.varlen_attn, block_table=pages)
    tensors = [x.to(device.type) for x in (query, key, value, *pools, query_starts, starts, pages)]
    there, keys, values, key_pages, value_pages, ends, key_ends, table = tensors
    splits = {"num_splits": 1} if "num_splits" in inspect.signature(varlen.varlen_attn).parameters else {}
    longest = max(lengths), slot
    with torch.no_grad(), device.active(), sdpa.enabled(cpu=device.name == "cpu"):
        found = [
            varlen.varlen_attn(there, keys, values, ends, key_ends, *longest, **terms),
            varlen.varlen_attn(there, key_pages, value_pages, ends, None, *longest, block_table=table, **terms),
            varlen.varlen_attn(
                there, key_pages, value_pages, ends, None, *longest, block_table=table, **terms, **splits
            ),
        ]
        with pytest.raises(NotImplementedError, match="block_table needs seqused_k"):
            varlen.varlen_attn(there, key_pages, value_pages, ends, None, *longest, block_table=table, enable_gqa=True)
        with pytest.raises(NotImplementedError, match="seqused_k needs cu_seq_q and cu_seq_k"):
            varlen.varlen_attn(there, keys, values, ends, None, *longest, **terms)
    done = 0
    for row, (count, length) in enumerate(zip(lengths, used.tolist(), strict=True)):
        rows = query[done : done + count].transpose(0, 1)[None]
        one = [tensor[row * slot : row * slot + length].transpose(0, 1)[None] for tensor in (key, value)]
        (expected, _), (plain, _) = (function(rows, *one, window=(None, 0)) for function in (attention, composition))
        for out in found:
            mine = out[done : done + count].transpose(0, 1)[None].cpu()
            assert largest_error(mine, expected) <= tolerance(plain, expected)
        done += count
