"""The feature lists of mps-flash-attn's READMEs, row by row, with what they say doesn't work there."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Device
from oracle import attention, composition, largest_error, tolerance
from test_mps_flash_attn import check, look_back, random
from torch import Tensor

import mfa
from mfa import mps_flash_attn as flash

README_0_1_14 = {
    "O(N) memory": "instead of O(N²), enabling 8K+ sequence lengths on unified memory",
    "Forward pass": "2-5x faster than PyTorch SDPA",  # how fast, only a Mac can say
    "Backward pass": "Full gradient support for training (fp32 precision)",
    "Causal masking": "Native kernel support (only 5% overhead)",
    "Attention masks": "Full boolean mask support for arbitrary masking patterns",
    "FP16/FP32": "Native fp16 output (no conversion overhead)",
    "Pre-compiled kernels": "Zero-compilation cold start (~6ms)",
}
ITS_LIMITATIONS = {
    "Sequence length": "must be divisible by block size (typically 64)",
    "Head dimension": "Best with 32, 64, 96, 128",
    "Dropout": "No dropout",
}
README_0_6_3 = {
    "Forward pass": "FP16/BF16/FP32",
    "Backward pass": "Full gradient support",
    "Causal masking": "Native kernel support",
    "Attention masks": "Boolean masks",
    "Sliding window": "For local attention models",
    "GQA/MQA": "Grouped-query attention",
    "Quantized KV": "FP8, INT8, NF4",
    "Chunked attention": "100K+ tokens",
    "torch.compile()": "Custom op backend",
    "Dropout": "Not supported",
}
N, D = 72, 32
WORKS: dict[str, Callable[[str], None]] = {}


def row(name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def keep(function: Callable[[str], None]) -> Callable[[str], None]:
        WORKS[name] = function
        return function

    return keep


def qkv(
    device: str, dtype: torch.dtype = torch.float16, key_heads: int = 2, length: int = N, dim: int = D
) -> list[Tensor]:
    torch.manual_seed(0)
    return [random(1, heads, length, dim, dtype=dtype, device=device) for heads in (2, key_heads, key_heads)]


def check_gradients(function: Callable[..., Tensor], inputs: list[Tensor], terms: dict[str, Any]) -> None:
    """Those of `function` against float64, by the numerics rule."""
    torch.manual_seed(1)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    grad = random(*out.shape, dtype=out.dtype)
    grads = torch.autograd.grad(out, leaves, grad.to(out.device))
    wanted = []
    for attend, dtype in ((composition, inputs[0].dtype), (attention, torch.float64)):
        copies = [tensor.detach().cpu().to(dtype).requires_grad_() for tensor in inputs]
        theirs, _ = attend(*copies, **terms)
        wanted.append(torch.autograd.grad(theirs, copies, grad.to(theirs.dtype)))
    for mine, plain, exact in zip(grads, *wanted, strict=True):
        assert mine.dtype == inputs[0].dtype
        assert largest_error(mine.cpu(), exact) <= tolerance(plain, exact, gradient=True)


@row("O(N) memory")
def memory(device: str) -> None:
    """What forward keeps for backward: inputs, out, and a float32 per row; no tensor of N x N elements."""
    saved: list[Tensor] = []
    query, key, value = (tensor.requires_grad_() for tensor in qkv(device))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        flash.flash_attention(query, key, value)
    assert saved
    assert max(tensor.numel() for tensor in saved) == query.numel() < N * N
    inputs = qkv(device, length=9000)  # test_cpu.py measures the memory of whole matrices
    inputs[0] = inputs[0][:, :, -40:]
    check(flash.flash_attention(*inputs), inputs, {})


@row("Forward pass")
def forward(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        inputs = qkv(device, dtype)
        check(flash.flash_attention(*inputs), inputs, {})


@row("Backward pass")
def backward(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_gradients(flash.flash_attention, qkv(device, dtype), {})


@row("Causal masking")
def causal(device: str) -> None:
    inputs = qkv(device)
    check(flash.flash_attention(*inputs, is_causal=True), inputs, {"is_causal": True})


@row("Attention masks")
def masks(device: str) -> None:
    inputs, masked = qkv(device), torch.rand(1, 1, N, N) < 0.5
    out = flash.flash_attention(*inputs, attn_mask=masked.to(device))
    check(out, inputs, {"bias": ~masked})


@row("FP16/FP32")
def output_dtype(device: str) -> None:
    for dtype in (torch.float16, torch.float32):
        assert flash.flash_attention(*qkv(device, dtype)).dtype == dtype


@row("Pre-compiled kernels")
def precompiled(device: str) -> None:
    """Nothing starts a compiler."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        forward(device)


@row("Sequence length")
def length(device: str) -> None:
    for n in (1, 7, 65):
        inputs = qkv(device, length=n)
        check(flash.flash_attention(*inputs, is_causal=True), inputs, {"is_causal": True})


@row("Head dimension")
def head_dimension(device: str) -> None:
    for dim in (1, 40, 72, 80, 256):
        inputs = qkv(device, length=20, dim=dim)
        check(flash.flash_attention(*inputs), inputs, {})


@row("Dropout")
def dropout(device: str) -> None:
    """The interface has no argument for it; SDPA has, which replace_sdpa routes to us."""
    query, key = torch.zeros(2, 1, 2, N, D, device=device)
    value = torch.eye(N, device=device).expand(1, 2, -1, -1)
    handle = flash.replace_sdpa(cpu=True)
    try:
        probability = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    finally:
        handle.remove()
    kept = probability > 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(probability[kept], torch.full_like(probability[kept], 1 / (0.75 * N)))


@row("Sliding window")
def window(device: str) -> None:
    inputs = qkv(device)
    out = flash.flash_attention(*inputs, is_causal=True, window_size=9)
    check(out, inputs, {"is_causal": True, "bias": look_back(N, N, 9)})


@row("GQA/MQA")
def grouped(device: str) -> None:
    inputs = qkv(device, key_heads=1)
    check(flash.flash_attention(*inputs), inputs, {})
    check_gradients(flash.flash_attention, inputs, {})


@row("Quantized KV")
def quantized(device: str) -> None:
    """Each with its own pair of functions; the errors are those of 8 and 4 bits."""
    query, key, value = qkv(device)
    exact, _ = attention(query.cpu(), key.cpu(), value.cpu())
    for name, bound in (("fp8", 0.05), ("int8", 0.02), ("nf4", 0.2)):
        k, v, k_scale, v_scale = getattr(flash, f"quantize_kv_{name}")(key, value)
        assert k.numel() == key.numel() // (2 if name == "nf4" else 1)
        out = getattr(flash, f"flash_attention_{name}")(query, k, v, k_scale, v_scale)
        assert largest_error(out.cpu(), exact) < bound


@row("Chunked attention")
def chunked(device: str) -> None:
    inputs = qkv(device)
    for is_causal in (False, True):
        out = flash.flash_attention_chunked(*inputs, chunk_size=25, is_causal=is_causal)
        check(out, inputs, {"is_causal": is_causal})


@row("torch.compile()")
def compiled(device: str) -> None:
    assert flash.register_custom_op()
    torch._dynamo.reset()
    inputs = qkv(device)
    function = torch.compile(flash.flash_attention, fullgraph=True, backend="aot_eager")
    check(function(*inputs), inputs, {})
    check_gradients(function, inputs, {})


def test_every_row_is_here() -> None:
    assert WORKS.keys() == {*README_0_1_14, *ITS_LIMITATIONS, *README_0_6_3}


@pytest.mark.parametrize("name", WORKS)
def test_row(name: str, device: Device) -> None:
    with device.active() as active:
        WORKS[name](device.type)
    if device.name == "simulator":
        assert active.launches  # type: ignore[attr-defined]
    assert not mfa.sdpa.is_enabled()
