"""The quantized keys and values of mfa.mps_flash_attn: the formats from their definitions, and attention over them."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from test_mps_flash_attn import check, look_back, qkv, random, run
from torch import Tensor

import mfa
from mfa import mps_flash_attn as flash

KINDS = {
    "fp8_e4m3": (flash.QUANT_FP8_E4M3, lambda *t: flash.quantize_kv_fp8(*t)),
    "fp8_e5m2": (flash.QUANT_FP8_E5M2, lambda *t: flash.quantize_kv_fp8(*t, use_e5m2=True)),
    "int8": (flash.QUANT_INT8, flash.quantize_kv_int8),
    "nf4": (flash.QUANT_NF4, flash.quantize_kv_nf4),
}
CODEBOOK = mfa.mps_flash_attn._quantized._nf4().float()


def dequantize(kind: str, quantized: Tensor, scale: Tensor) -> Tensor:
    """Written from the formats' definitions."""
    if kind == "nf4":
        pairs = [CODEBOOK[(quantized & 15).long()], CODEBOOK[(quantized >> 4).long()]]
        numbers = torch.stack(pairs, dim=-1).flatten(-2)
    elif kind == "int8":
        numbers = quantized.float() - 128
    else:
        numbers = quantized.view(torch.float8_e5m2 if kind == "fp8_e5m2" else torch.float8_e4m3fn).float()
    return numbers * scale[..., None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_compile_is_done_once_for_all_lengths(kind: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    quantize = torch.compile(KINDS[kind][1], fullgraph=True, dynamic=True, backend=counter)
    for length in (16, 24, 40):
        tensors = random(2, 3, length, 8), random(2, 3, length, 8)
        for result, expected in zip(quantize(*tensors), KINDS[kind][1](*tensors), strict=True):
            assert torch.equal(result, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing(kind: str) -> None:
    torch.manual_seed(0)
    tensor = random(2, 3, 50, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    tensor[0, 0, :2] = 0
    _, quantize = KINDS[kind]
    quantized, other, scale, other_scale = quantize(tensor, -tensor)
    assert quantized.dtype == other.dtype == torch.uint8
    assert scale.shape == other_scale.shape == (2, 3)
    assert scale.dtype == torch.float32
    assert quantized.shape == ((2, 3, 50, 8) if kind == "nf4" else tensor.shape)
    largest = tensor.abs().amax((2, 3))
    error = (dequantize(kind, quantized, scale) - tensor).abs().amax((2, 3)) / largest
    assert (error < {"fp8_e4m3": 0.036, "fp8_e5m2": 0.072, "int8": 0.004, "nf4": 0.153}[kind]).all()
    assert torch.equal(quantize(tensor)[0], quantized)
    normalized = tensor / scale[..., None, None]
    if kind.startswith("fp8"):  # bit for bit what torch's cast makes, ties included
        dtype = torch.float8_e5m2 if kind == "fp8_e5m2" else torch.float8_e4m3fn
        assert torch.equal(quantized, normalized.to(dtype).view(torch.uint8))
        ties = torch.arange(0, 449, dtype=torch.float32).view(1, 1, 1, -1)
        assert torch.equal(quantize(ties)[0], (ties / quantize(ties)[1][..., None, None]).to(dtype).view(torch.uint8))
    if kind == "nf4":  # the nearest of the sixteen
        nearest = (normalized[..., None] - CODEBOOK).abs().argmin(-1)
        assert torch.equal(torch.stack([quantized & 15, quantized >> 4], dim=-1).flatten(-2).long(), nearest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("per_batch", [True, False])
def test_quantized_attention(kind: str, rows: int, per_batch: bool, device: Device) -> None:
    query, key, value = qkv(device.type)
    query, number = query[:, :, :rows], KINDS[kind][0]
    k, v, k_scale, v_scale = KINDS[kind][1](key, value)
    if not per_batch:
        k_scale, v_scale = k_scale[0], v_scale[0]
    arguments = (query, k, v, k_scale, v_scale, number, False, None, 12, 0.3)
    out = run(device, flash.flash_attention_quantized, *arguments)
    plain = [query.cpu(), *(dequantize(kind, x.cpu(), s.cpu()) for x, s in ((k, k_scale), (v, v_scale)))]
    check(out, plain, {"scale": 0.3, "bias": look_back(rows, 34, 12)})


def test_quantized_functions_agree() -> None:
    query, key, value = qkv()
    mask = torch.rand(21, 34) < 0.3
    options: dict[str, Any] = {"is_causal": True, "attn_mask": mask, "window_size": 20, "scale": 0.2}
    for kind, function, extra in (
        ("fp8_e4m3", flash.flash_attention_fp8, {}),
        ("fp8_e5m2", flash.flash_attention_fp8, {"use_e5m2": True}),
        ("int8", flash.flash_attention_int8, {}),
        ("nf4", flash.flash_attention_nf4, {}),
    ):
        quantized = KINDS[kind][1](key, value)
        out = function(query, *quantized, **options, **extra)
        assert torch.equal(out, flash.flash_attention_quantized(query, *quantized, KINDS[kind][0], **options))
        exact = flash.flash_attention(query, key, value, **options)
        assert (out - exact).abs().max() < {"fp8_e4m3": 0.2, "fp8_e5m2": 0.4, "int8": 0.05, "nf4": 0.6}[kind]


def test_quantized_gives_the_query_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfa.mps_flash_attn._quantized, "_CHUNK", 16)  # so that chunks are merged, too
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    quantized = flash.quantize_kv_int8(key, value)
    assert not any(tensor.requires_grad for tensor in quantized)
    rows = query[:, :, :4]
    out = flash.flash_attention_int8(rows, *quantized)
    plain = [dequantize("int8", *pair) for pair in zip(quantized[:2], quantized[2:], strict=True)]
    expected = flash.flash_attention(rows, *plain)
    torch.testing.assert_close(out, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(result.sum(), query) for result in (out, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
