"""Selective activation checkpointing with mfa.ops_to_save: attention runs once, and gradients are the same."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mfa
from mfa import sdpa
from mfa.flash_attn import flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.simulator  # which counts kernels

# For torch's own op, as docs/training.md says.
SAVED = [*mfa.ops_to_save, torch.ops.torch_attn._varlen_attn.default]
HEADS, DIM, STARTS = 2, 16, torch.tensor([0, 5, 9], dtype=torch.int32)


def heads_last(x: Tensor) -> Iterator[Tensor]:
    return iter(x.unflatten(-1, (3, HEADS, DIM)).unbind(2))


def heads_first(x: Tensor) -> Iterator[Tensor]:
    return (tensor.transpose(1, 2) for tensor in heads_last(x))


def frozen(x: Tensor) -> Tensor:
    """Attention that doesn't require grad, whose result a gradient needs."""
    return mfa.attention(*heads_first(x.detach()), is_causal=True) * x[..., :1]


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "mfa.attention": lambda x: mfa.attention(*heads_first(x), is_causal=True),
    "torch.ops.mfa.attention": lambda x: torch.ops.mfa.attention(*heads_first(x), None, 0.0, True),
    "F.sdpa routed": lambda x: scaled_dot_product_attention(*heads_first(x), is_causal=True),
    "flash_attn_func": lambda x: flash_attn_func(*heads_last(x), causal=True),
    "flash_attn_varlen_func": lambda x: flash_attn_varlen_func(*(y[0] for y in heads_last(x)), STARTS, STARTS, 5, 5),
    "varlen_attn routed": lambda x: varlen_attn(*(y[0] for y in heads_last(x)), STARTS, STARTS, 5, 5),
    "mfa.attention, frozen": frozen,
}


def forward_kernels(block: Callable[[Tensor], Tensor], x: Tensor, compiled: bool) -> tuple[list[str], Tensor]:
    """The kernels that forward and backward passes launch, but for those of the backward pass; and the gradient."""
    torch._dynamo.reset()
    # Compiled or not while the routes are active: graphs keep what is active when they are made.
    with sdpa.enabled(cpu=True), mfa.simulate(counters=False) as simulation:
        function = torch.compile(block, backend="aot_eager") if compiled else block
        (grad,) = torch.autograd.grad(function(x).float().square().sum(), x)
    kernels = [launch.kernel for launch in simulation.launches if "backward" not in launch.kernel]
    return kernels, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", BLOCKS)
def test_attention_runs_once(name: str, compiled: bool, dtype: torch.dtype) -> None:
    def block(x: Tensor) -> Tensor:
        return BLOCKS[name](x.sin()).cos()

    def checkpointed(saved: list[Any]) -> Callable[[Tensor], Tensor]:
        context = functools.partial(create_selective_checkpoint_contexts, saved)
        return lambda x: checkpoint(block, x, use_reentrant=False, context_fn=context)

    torch.manual_seed(0)
    x = torch.randn(1, 9, 3 * HEADS * DIM, dtype=dtype, requires_grad=True)
    once, expected = forward_kernels(block, x, compiled)
    saved, grad = forward_kernels(checkpointed(SAVED), x, compiled)
    assert saved == once
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    recomputed, _ = forward_kernels(checkpointed([]), x, compiled)
    assert len(recomputed) > len(once)  # what the list is for


def test_the_list_is_taken_as_it_is() -> None:
    create_selective_checkpoint_contexts(mfa.ops_to_save)
