"""torch.nn.attention.varlen.varlen_attn by mfa: the aten ops behind it."""

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


def packed(device: Device, heads: int = 2) -> tuple[Inputs, Tensor]:
    torch.manual_seed(0)
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = tuple(random(sum(LENGTHS), heads, 16, dtype=torch.float16, device=device.type) for _ in range(3))
    return inputs, starts.to(device.type)  # type: ignore[return-value]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (2, 1)])
def test_varlen_attn(device: Device, varlen: Any, window: tuple[int, int]) -> None:
    inputs, starts = packed(device)
    with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
        aux = varlen.AuxRequest(lse=True)
        out, lse = varlen.varlen_attn(*inputs, starts, starts, 20, 20, return_aux=aux, window_size=window)
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


def test_varlen_attn_backward(varlen: Any) -> None:
    inputs, starts = packed(Device("cpu"))
    inputs = tuple(tensor.double().requires_grad_() for tensor in inputs)  # type: ignore[assignment]
    with sdpa.enabled(cpu=True):
        out = varlen.varlen_attn(*inputs, starts, starts, 20, 20, window_size=(-1, 0))
        grads = torch.autograd.grad(out.square().sum(), inputs)
        compiled = torch.compile(varlen.varlen_attn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, starts, starts, 20, 20, window_size=(-1, 0)), out)
    bounds = zip(starts.tolist(), starts.tolist()[1:], strict=False)
    parts = [
        [tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in inputs] for start, end in bounds if start < end
    ]
    expected = torch.cat([attention(*part, window=(None, 0))[0].squeeze(0).transpose(0, 1) for part in parts])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))


def test_varlen_attn_caches(varlen: Any) -> None:
    """One query for each of three caches, in slots and in pages."""
    torch.manual_seed(0)
    used, slot, page = torch.tensor([5, 1, 16], dtype=torch.int32), 16, 8
    query, (key, value) = random(3, 4, 16), (random(3 * slot, 2, 16) for _ in range(2))
    query_starts, starts = torch.arange(4, dtype=torch.int32), torch.arange(0, 49, slot, dtype=torch.int32)
    pages = torch.tensor([[4, 1], [0, 5], [2, 3]], dtype=torch.int32)
    pools = [torch.empty(6, page, 2, 16) for _ in range(2)]
    for pool, tensor in zip(pools, (key, value), strict=True):
        pool[pages.flatten().long()] = tensor.view(6, page, 2, 16)
    options = {"enable_gqa": True, "seqused_k": used}
    with torch.no_grad(), sdpa.enabled(cpu=True):
        slots = varlen.varlen_attn(query, key, value, query_starts, starts, 1, slot, **options)
        paged = varlen.varlen_attn(query, *pools, query_starts, None, 1, slot, block_table=pages, **options)
        with pytest.raises(NotImplementedError, match="queries of one length"):
            varlen.varlen_attn(query, key, value, query_starts, starts, 2, slot, **options)
    for row, length in enumerate(used.tolist()):
        one = [
            tensor[None, :, row * slot : row * slot + length] for tensor in (key.transpose(0, 1), value.transpose(0, 1))
        ]
        expected, _ = attention(query[row, None, :, None], *one)
        for out in (slots, paged):
            torch.testing.assert_close(out[row], expected[0, :, 0].float())
