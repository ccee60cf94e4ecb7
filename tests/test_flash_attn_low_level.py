"""_flash_attn_forward, _flash_attn_backward and their varlen twins: what ring attention and others import."""

from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from torch import Tensor

from mfa import flash_attn, merge_attention
from mfa.flash_attn import flash_attn_interface as interface

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02])
# causal, left, right, softcap, slopes; and the oracle's terms
TERMS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "open": ((False, -1, -1, 0.0, None), {}),
    "causal": ((True, -1, -1, 0.0, None), {"window": (None, 0)}),
    "all": ((False, 4, 2, 3.0, SLOPES), {"window": (4, 2), "softcap": 3.0, "alibi_slopes": SLOPES}),
}
SCALE = 0.3


def inputs(length_q: int, length_k: int) -> list[Tensor]:
    """Q [2,Lq,4,16], k [2,Lk,2,16], v [2,Lk,2,16] and the gradient of out."""
    torch.manual_seed(0)
    lengths, heads = (length_q, length_k, length_k, length_q), (4, 2, 2, 4)
    return [torch.randn(2, length, h, 16) for length, h in zip(lengths, heads, strict=True)]


def wanted(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **terms: Any) -> list[list[Tensor]]:
    """Out, lse, and gradients [2,L,H,D] in float64, and by plain PyTorch in float32."""
    found = []
    for attend, dtype in ((oracle.attention, torch.float64), (oracle.composition, torch.float32)):
        tensors = [x.transpose(1, 2).to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attend(*tensors, scale=SCALE, **terms)
        grads = torch.autograd.grad(out, tensors, dout.transpose(1, 2).to(dtype))
        found.append([out.transpose(1, 2), lse, *(grad.transpose(1, 2) for grad in grads)])
    return found


def check(results: list[Tensor], expected: list[Tensor], plain: list[Tensor]) -> None:
    for i, (actual, double, single) in enumerate(zip(results, expected, plain, strict=True)):
        assert oracle.largest_error(actual.cpu(), double) <= oracle.tolerance(single, double, gradient=i > 1)


def moved(device: Device, *arguments: Any) -> list[Any]:
    return [x.to(device.type) if isinstance(x, Tensor) else x for x in arguments]


@pytest.mark.parametrize("case", TERMS)
def test_dense(case: str, device: Device) -> None:
    arguments, terms = TERMS[case]
    tensors = inputs(9, 13)
    q, k, v, dout, *rest = moved(device, *tensors, *arguments)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    with device.active():
        out, lse, pattern, state = interface._flash_attn_forward(q, k, v, 0.0, SCALE, *rest, False)
        sums = interface._flash_attn_backward(dout, q, k, v, out, lse, *grads, 0.0, SCALE, *rest, False, state)
        some = torch.full_like(k, torch.nan)
        interface._flash_attn_backward(dout, q, k, v, out, lse, None, some, None, 0.0, SCALE, *rest, True)
    assert pattern.numel() == 0
    assert (state.dtype, state.shape) == (torch.int64, (2,))
    check([out, lse, *grads], *wanted(*tensors, **terms))
    torch.testing.assert_close(sums, (dout * out).sum(-1).transpose(1, 2))
    torch.testing.assert_close(some, grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("case", TERMS)
def test_varlen(case: str, device: Device) -> None:
    arguments, terms = TERMS[case]
    tensors = inputs(9, 13)
    flat = [x.flatten(0, 1) for x in tensors]
    q, k, v, dout, *rest = moved(device, *flat, *arguments)
    layout = [torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device.type) for length in (9, 13)]
    sizes = (*layout, 9, 13)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    with device.active():
        out, lse, _, state = interface._flash_attn_varlen_forward(q, k, v, *sizes, 0.0, SCALE, *rest)
        results = (dout, q, k, v, out, lse, *grads)
        sums = interface._flash_attn_varlen_backward(*results, *sizes, 0.0, SCALE, *rest, False, state)
    torch.testing.assert_close(sums, (dout * out).sum(-1).T)
    batched = [x.unflatten(0, (2, -1)) for x in (out, *grads)]
    check([batched[0], lse.unflatten(1, (2, 9)).transpose(0, 1), *batched[1:]], *wanted(*tensors, **terms))


def test_ring(device: Device) -> None:
    """Two parts of the keys: backward of each takes the out and lse of both, and the gradients of queries add up."""
    tensors = inputs(8, 12)
    q, k, v, dout = moved(device, *tensors)
    parts = [(k[:, :5], v[:, :5]), (k[:, 5:], v[:, 5:])]
    terms = (0.0, SCALE, False, -1, -1, 0.0, None)
    with device.active():
        outs = [interface._flash_attn_forward(q, *part, *terms, False)[:2] for part in parts]
        out, lse = merge_attention(*(x for o, s in outs for x in (o.transpose(1, 2), s)))
        out = out.transpose(1, 2)
        grads = []
        for part in parts:
            grads.append([torch.empty_like(x) for x in (q, *part)])
            interface._flash_attn_backward(dout, q, *part, out, lse, *grads[-1], *terms, False)
    first, second = grads
    joined = [torch.cat(pair, 1) for pair in zip(first[1:], second[1:], strict=True)]
    check([out, lse, first[0] + second[0], *joined], *wanted(*tensors))


def test_dropout() -> None:
    """The state makes backward drop what forward dropped; the seed makes both as in flash_attn_func."""
    q, k, v, dout = inputs(9, 13)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(3)
    expected = flash_attn.flash_attn_func(*leaves, 0.5, SCALE)
    wanted_grads = torch.autograd.grad(expected, leaves, dout)
    starts = [torch.tensor([0, length], dtype=torch.int32) for length in (9, 13)]
    terms = (0.5, SCALE, False, -1, -1, 0.0, None)
    for packed in (False, True):
        rows = [x[0] if packed else x for x in (q, k, v, dout)]
        layout = (*starts, 9, 13) if packed else ()
        forward = interface._flash_attn_varlen_forward if packed else interface._flash_attn_forward
        backward = interface._flash_attn_varlen_backward if packed else interface._flash_attn_backward
        grads = [torch.empty_like(x) for x in rows[:3]]
        torch.manual_seed(3)
        out, lse, _, state = forward(*rows[:3], *layout, *terms, False)  # type: ignore[operator]
        results = (rows[3], *rows[:3], out, lse, *grads)
        backward(*results, *layout, *terms, False, state)  # type: ignore[operator]
        torch.testing.assert_close(out, expected[0] if packed else expected)
        for actual, grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(actual, grad[0] if packed else grad)
        with pytest.raises(RuntimeError, match="rng_state"):
            backward(*results, *layout, *terms, False)  # type: ignore[operator]
        with pytest.raises(NotImplementedError, match="return_softmax"):
            forward(*rows[:3], *layout, *terms, True)  # type: ignore[operator]


def test_varlen_keys_that_count(device: Device) -> None:
    """leftpad_k and seqused_k take keys away from both ends of a sequence; the same as without those keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(7, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    starts_q, starts_k = torch.tensor([0, 2, 2, 7]), torch.tensor([0, 6, 8, 20])
    pads, used = torch.tensor([1, 0, 4]), torch.tensor([6, 0, 10])
    live = torch.cat([torch.arange(int(a + p), int(a + u)) for a, p, u in zip(starts_k, pads, used, strict=False)])
    compact = torch.tensor([0, 5, 5, 11])
    index = [x.int() for x in (starts_q, starts_k, compact, pads, used)]
    tensors = moved(device, q, k, v, k[live], v[live], *index)
    terms = (0.0, SCALE, True, -1, -1, 2.0, None, False, None)
    hidden = torch.ones(20, dtype=torch.bool)
    hidden[live] = False
    for x in tensors[1:3]:
        x[hidden.to(device.type)] = torch.nan
    with device.active():
        q, k, v, live_k, live_v, starts_q, starts_k, compact, pads, used = tensors
        actual = interface._flash_attn_varlen_forward(q, k, v, starts_q, starts_k, 5, 12, *terms, pads, used)
        expected = interface._flash_attn_varlen_forward(q, live_k, live_v, starts_q, compact, 5, 12, *terms)
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
