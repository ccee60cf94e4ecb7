"""attention_varlen in PyTorch's machinery: opcheck, compile, export, vmap, autocast, FLOPs."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from serving import moved, normal, starts
from test_varlen import LENGTHS, arguments
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import mfa

CPU = Device("cpu")


def op_arguments(*, features: bool = True) -> tuple[Any, ...]:
    sinks, slopes = (normal(4), normal(5, 4).abs()) if features else (None, None)
    used = torch.tensor([7, 4, 0, 0, 3], dtype=torch.int32) if features else None
    return (*arguments(CPU), sinks, slopes, 0.25, 20, 0, 5.0 if features else 0.0, 0.0, None, used)


def test_opcheck_forward(device: Device) -> None:
    with device.active():
        opcheck(torch.ops.mfa.attention_varlen_forward.default, tuple(moved(x, device) for x in op_arguments()))


@pytest.mark.parametrize("mask", [[True] * 5, [False, True, True, False, True]])
def test_opcheck_gradients(mask: list[bool]) -> None:
    inputs = op_arguments()
    out, lse = torch.ops.mfa.attention_varlen_forward(*inputs)
    opcheck(
        torch.ops.mfa.attention_varlen_backward.default,
        (*inputs, torch.ones_like(out), torch.ones_like(lse), out, lse, None, mask),
    )
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    opcheck(torch.ops.mfa.attention_varlen_forward.default, tuple(leaves))


def test_compile_is_done_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(query: Tensor, key: Tensor, value: Tensor, *layout: Any) -> Tensor:
        return mfa.attention_varlen(query, key, value, *layout, is_causal=True, window=(50, None)).sin()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in (((5, 9), (7, 7)), ((20, 31), (3, 4), (9, 9)), ((40, 33), (8, 8), (11, 2), (2, 3))):
        query, key, value, *layout = arguments(CPU, lengths)
        tensors = [x.requires_grad_() for x in (query, key, value)]
        out, expected = compiled(*tensors, *layout), model(*tensors, *layout)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
        )
    assert counter.frame_count == 1


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
            return mfa.attention_varlen(query, key, value, cu_q, cu_k, 64, 64, is_causal=True)

    tokens_q, tokens_k, ends = (torch.export.Dim(name, min=2, max=4096) for name in ("tq", "tk", "ends"))
    shapes = ({0: tokens_q}, {0: tokens_k}, {0: tokens_k}, {0: ends}, {0: ends})
    program = torch.export.export(Model(), arguments(CPU)[:5], dynamic_shapes=shapes)
    other = arguments(CPU, ((8, 8), (30, 40), (1, 2)))[:5]
    torch.testing.assert_close(program.module()(*other), Model()(*other), rtol=0, atol=0)


def test_vmap() -> None:
    layout = starts([5, 4]), starts([6, 9]), 5, 9
    query, key, value = normal(3, 9, 4, 8), normal(15, 2, 8, seed=1), normal(15, 2, 3, 8, seed=2)
    sinks, slopes = normal(3, 4, seed=3), normal(2, 4, seed=4).abs()

    def f(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        terms: dict[str, Any] = {"is_causal": True, "sinks": sinks, "alibi_slopes": slopes, "return_lse": True}
        return mfa.attention_varlen(query, key, value, *layout, **terms)

    out, lse = torch.vmap(f, in_dims=(0, None, 2, 0))(query, key, value, sinks)
    loop = [f(query[i], key, value[:, :, i], sinks[i]) for i in range(3)]
    torch.testing.assert_close(list(out), [x for x, _ in loop])
    torch.testing.assert_close(list(lse), [x for _, x in loop])

    def grads(query: Tensor, value: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        terms = (sinks, slopes, 0.3, None, 0, 0.0, 0.0, None, None)
        given = (out.cos(), lse, out, lse, None, [True, True, False, True, True])
        return torch.ops.mfa.attention_varlen_backward(query, key, value, *layout, *terms, *given)

    mapped = torch.vmap(grads, in_dims=(0, 2, 0, 0, 0))(query, value, sinks, out, lse)
    singles = [grads(query[i], value[:, :, i], sinks[i], out[i], lse[i]) for i in range(3)]
    for j in range(5):
        torch.testing.assert_close(list(mapped[j]), [single[j] for single in singles])


def test_vmap_over_the_lengths() -> None:
    query, key, value = normal(9, 4, 8), normal(15, 2, 8, seed=1), normal(15, 2, 8, seed=2)
    ends, used = torch.stack([starts([5, 4]), starts([2, 6])]), torch.tensor([[6, 2], [0, 9]], dtype=torch.int32)

    def f(cu_q: Tensor, seqused_k: Tensor) -> Tensor:
        return mfa.attention_varlen(query, key, value, cu_q, starts([6, 9]), 9, 9, seqused_k=seqused_k)

    torch.testing.assert_close(list(torch.vmap(f)(ends, used)), [f(ends[i], used[i]) for i in range(2)])
    torch.testing.assert_close(
        list(torch.vmap(f, in_dims=(None, 0))(ends[0], used)), [f(ends[0], used[i]) for i in range(2)]
    )


def test_autocast() -> None:
    query, key, value, *layout = arguments(CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mfa.attention_varlen(query.half(), key, value.requires_grad_(), *layout, sinks=normal(4))
        raw = torch.ops.mfa.attention_varlen_forward(
            *(query, key, value, *layout, None, None, 0.3, None, None, 0.0, 0.0, None, None)
        )[0]
    assert out.dtype == raw.dtype == torch.bfloat16
    out.sum().backward()
    assert value.grad is not None
    assert value.grad.dtype == torch.float32


def test_flops_are_those_of_the_lengths() -> None:
    query, key, value, *layout = arguments(CPU)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    pairs = sum(a * b for a, b in LENGTHS)
    with FlopCounterMode(display=False) as counter:
        out = mfa.attention_varlen(*tensors, *layout)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 4 * pairs * 64
    assert counter.get_total_flops() - forward == 2 * 4 * pairs * 160
