"""mfa.mps_flash_attn: the interface of mps-flash-attn 0.6.3, its conventions against float64, the seed's snippets."""

import inspect
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Device
from oracle import attention, composition, largest_error, tolerance
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mfa
from mfa import _log, sdpa
from mfa import mps_flash_attn as flash

Check = Callable[[Tensor, list[Tensor], dict[str, Any]], None]

# The python snippets of the README of mps-flash-attn 0.1.14, as they stand.
SEED = """
```python
from mps_flash_attn import flash_attention

# Standard attention (B, H, N, D)
q = torch.randn(2, 8, 4096, 64, device='mps', dtype=torch.float16)
k = torch.randn(2, 8, 4096, 64, device='mps', dtype=torch.float16)
v = torch.randn(2, 8, 4096, 64, device='mps', dtype=torch.float16)

out = flash_attention(q, k, v)
```
```python
out = flash_attention(q, k, v, is_causal=True)
```
```python
# Boolean mask: True = masked (don't attend), False = attend
mask = torch.zeros(B, 1, N, N, dtype=torch.bool, device='mps')
mask[:, :, :, 512:] = True  # Mask out positions after 512

out = flash_attention(q, k, v, attn_mask=mask)
```
```python
q.requires_grad = True
k.requires_grad = True
v.requires_grad = True

out = flash_attention(q, k, v, is_causal=True)
loss = out.sum()
loss.backward()  # Computes dQ, dK, dV
```
```python
from mps_flash_attn import replace_sdpa

# Monkey-patch F.scaled_dot_product_attention
replace_sdpa()

# Now all attention ops use Flash Attention on MPS
```
"""

# What 0.6.3's README adds; without torch.ops.mfa.flash_attention, which doesn't exist there.
LATER = """
```python
# Only attend to last 4096 tokens
out = flash_attention(q, k, v, is_causal=True, window_size=4096)
```
```python
from mps_flash_attn import flash_attention_fp8, quantize_kv_fp8

# Quantize K/V to FP8
k_quant, k_scale = quantize_kv_fp8(k)
v_quant, v_scale = quantize_kv_fp8(v)

# Run attention with quantized KV
out = flash_attention_fp8(q, k_quant, v_quant, k_scale, v_scale)
```
```python
from mps_flash_attn import flash_attention_chunked

out = flash_attention_chunked(q, k, v, chunk_size=8192)
```
```python
from mps_flash_attn import register_custom_op

register_custom_op()
```
```python
q.requires_grad = True
out = flash_attention(q, k, v, bf16_backward=True)  # 2x faster backward
loss = out.sum()
loss.backward()
```
```python
from mps_flash_attn.benchmark import run_suite, compare_vs_sdpa

results = run_suite(seq_lengths=[64], dtypes=['float32'], batch_sizes=[1], head_dims=[32], verbose=False)
compare_vs_sdpa(seq_lengths=[64], verbose=False)
```
"""

QUANTIZED = "is_causal=False, attn_mask=None, window_size=0"
SIGNATURES = {  # of 0.6.3
    "flash_attention": "query, key, value, is_causal=False, scale=None, attn_mask=None, window_size=0, "
    "bf16_backward=False",
    "flash_attention_with_bias": "query, key, value, attn_bias, is_causal=False, scale=None, window_size=0, "
    "bias_repeat_count=0",
    "flash_attention_chunked": "query, key, value, chunk_size=16384, is_causal=False, scale=None",
    "quantize_kv_fp8": "key, value=None, use_e5m2=False",  # there, value must be given
    "quantize_kv_int8": "key, value=None",
    "quantize_kv_nf4": "key, value=None",
    "flash_attention_fp8": f"query, key, value, k_scale, v_scale, {QUANTIZED}, use_e5m2=False, scale=None",
    "flash_attention_int8": f"query, key, value, k_scale, v_scale, {QUANTIZED}, scale=None",
    "flash_attention_nf4": f"query, key, value, k_scale, v_scale, {QUANTIZED}, scale=None",
    "flash_attention_quantized": f"query, key, value, k_scale, v_scale, quant_type, {QUANTIZED}, scale=None",
    "convert_mask": "attn_mask",
    "replace_sdpa": "*, cpu=False",  # there, no arguments
    "precompile": "",
    "clear_cache": "",
    "register_custom_op": "",
    "is_available": "",
    "benchmark.run_suite": "seq_lengths=None, dtypes=None, batch_sizes=None, head_dims=None, num_heads_list=None, "
    "include_causal=True, include_window=True, include_backward=False, verbose=True",
    "benchmark.compare_vs_sdpa": "seq_lengths=None, dtype='float16', verbose=True",
    "benchmark.generate_report": "results, output_path, title='MPS Flash Attention Benchmark Report'",
    "benchmark.run_benchmark": "config",
}


def snippets(text: str, device: str) -> str:
    """The code between the fences, with this package's import and device, as a user would change them."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    return code.replace("from mps_flash_attn", "from mfa.mps_flash_attn").replace("device='mps'", f"device='{device}'")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def qkv(
    device: str = "cpu", heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float32, grad: bool = False
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, heads, 21, 32), (2, key_heads, 34, 32), (2, key_heads, 34, 32)]
    return [random(*shape, dtype=dtype, device=device, grad=grad) for shape in shapes]


def check(out: Tensor, inputs: list[Tensor], terms: dict[str, Any]) -> None:
    """The numerics rule, for a result and what the oracle calls the same problem."""
    inputs = [tensor.detach().cpu() for tensor in inputs]
    expected, _ = attention(*inputs, **terms)
    plain, _ = composition(*inputs, **terms)
    assert out.dtype == inputs[0].dtype
    assert largest_error(out.detach().cpu(), expected) <= tolerance(plain, expected)


def run(device: Device, function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Calls on the device; skips, with its reason, what it can't do yet."""
    with device.active(), torch.no_grad():
        try:
            return function(*arguments, **options)
        except NotImplementedError as error:
            if not device.has_kernels:
                raise
            pytest.skip(str(error))


def look_back(length_q: int, length_k: int, window: int) -> Tensor:
    return torch.arange(length_k)[None] >= torch.arange(length_q)[:, None] - window


# -- the interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    function = flash
    for part in name.split("."):
        function = getattr(function, part)
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None")).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]


def test_names() -> None:
    assert all(hasattr(flash, name) for name in flash.__all__)
    assert {name for name in SIGNATURES if "." not in name} <= set(flash.__all__)
    assert (flash.QUANT_FP8_E4M3, flash.QUANT_FP8_E5M2, flash.QUANT_INT8, flash.QUANT_NF4) == (3, 4, 5, 6)
    assert flash.__version__ == "0.6.3"
    assert flash.is_available() == mfa.is_available()
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        flash.no_such_name  # noqa: B018


def test_that_package_can_be_imported_too() -> None:
    """It defines the namespace `mfa` and five ops in it; ours are a fragment without them."""
    library = torch.library.Library("mfa", "DEF")
    library._destroy()
    for name in ("forward", "forward_with_lse", "forward_with_bias_lse", "backward", "backward_with_bias"):
        assert not hasattr(torch.ops.mfa, name)


@pytest.mark.slow
def test_snippets_of_the_seed() -> None:
    namespace: dict[str, Any] = {"torch": torch, "B": 2, "N": 4096}
    try:
        exec(snippets(SEED, "cpu"), namespace)
        assert sdpa.is_enabled()
    finally:
        sdpa.disable()
    inputs = [namespace[name] for name in "qkv"]
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
    rows = slice(1000, 1016)
    part = [inputs[0][:, :, rows], inputs[1][:, :, :1016], inputs[2][:, :, :1016]]
    check(namespace["out"][:, :, rows], part, {"window": (None, 0)})


@pytest.mark.parametrize("text", [SEED, LATER], ids=["seed", "later"])
def test_snippets_at_another_length(text: str, device: Device) -> None:
    """The same text with 4096 made smaller, for every device."""
    start = SEED.split("```python")[1]
    code = (
        snippets(f"```python{start}" + text, device.type)
        .replace("4096", "96")
        .replace("8192", "40")
        .replace("512", "48")
    )
    namespace: dict[str, Any] = {"torch": torch, "B": 2, "N": 96}
    with device.active():
        try:
            exec(code, namespace)
        except NotImplementedError as error:
            if not device.has_kernels:
                raise
            pytest.skip(str(error))
        finally:
            sdpa.disable()
    assert namespace["q"].grad.isfinite().all()


# -- masks, windows, biases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(21, 34), (2, 21, 34), (2, 1, 34), (2, 4, 21, 34), (1, 4, 1, 34), (2, 1, 21, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_mask(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
    inputs = qkv(device.type)
    masked = torch.rand(shape) < 0.3
    full = masked if len(shape) != 3 else masked[:, None]
    bias: Tensor = ~full
    mask = masked.to(dtype)
    if dtype == torch.float32:  # honoured as SDPA does, where that package would cut it at -1000
        mask = random(*shape)
        bias = mask if len(shape) != 3 else mask[:, None]
    out = run(device, flash.flash_attention, *inputs, attn_mask=mask.to(device.type))
    check(out, inputs, {"bias": bias})


@pytest.mark.parametrize("window", [0, 1, 5, 50])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("swapped", [False, True], ids=["Lq<Lk", "Lq>Lk"])
def test_window_looks_back(window: int, is_causal: bool, swapped: bool, device: Device) -> None:
    query, key, value = qkv(device.type, 2, 2, torch.float16)
    inputs = [key, query, query] if swapped else [query, key, value]
    out = run(device, flash.flash_attention, *inputs, is_causal=is_causal, window_size=window)
    bias = look_back(inputs[0].shape[2], inputs[1].shape[2], window) if window else None
    check(out, inputs, {"is_causal": is_causal, "bias": bias})


@pytest.mark.parametrize("shape", [(2, 4, 21, 34), (1, 4, 21, 34), (4, 21, 34), (1, 1, 21, 34), (2, 1, 1, 34)])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_bias_comes_before_the_scale(shape: tuple[int, ...], scale: float | None, device: Device) -> None:
    inputs = qkv(device.type)
    bias = random(*shape, device=device.type)
    out = run(device, flash.flash_attention_with_bias, *inputs, bias, is_causal=True, scale=scale, window_size=9)
    factor = 1 / math.sqrt(32) if scale is None else scale
    scaled = (bias.cpu() * factor).masked_fill(~look_back(21, 34, 9), -torch.inf)
    check(out, inputs, {"is_causal": True, "scale": scale, "bias": scaled if scaled.dim() == 4 else scaled[None]})


@pytest.mark.parametrize(("batch", "repeats", "heads"), [(6, 3, 4), (6, 3, 1), (5, 2, 4), (6, 6, 4), (4, 7, 4)])
def test_bias_repeats(batch: int, repeats: int, heads: int) -> None:
    torch.manual_seed(0)
    shape = [(batch, 4, 9, 16), (batch, 2, 9, 16), (batch, 2, 9, 16)]
    inputs = [random(*size, grad=True) for size in shape]
    bias = random(repeats, heads, 9, 9, grad=True)
    out = flash.flash_attention_with_bias(*inputs, bias, bias_repeat_count=repeats)
    grads = torch.autograd.grad(out.square().sum(), (*inputs, bias))
    each = bias[torch.arange(batch) % repeats]
    expected = flash.flash_attention_with_bias(*inputs, each)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected.square().sum(), (*inputs, bias)), rtol=1e-4, atol=1e-5
    )
    single = bias[:1]
    alone = flash.flash_attention_with_bias(*inputs, single, bias_repeat_count=repeats)
    torch.testing.assert_close(alone, flash.flash_attention_with_bias(*inputs, single))


def test_gradients_and_that_of_the_bias() -> None:
    inputs = [tensor[:, :, :7].detach().double().requires_grad_() for tensor in qkv()]
    bias = random(1, 4, 7, 7, dtype=torch.float64, grad=True)

    def biased(*tensors: Tensor) -> Tensor:
        return flash.flash_attention_with_bias(*tensors, is_causal=True, scale=0.4, window_size=3)

    assert torch.autograd.gradcheck(biased, (*inputs, bias), fast_mode=True)


def test_convert_mask() -> None:
    assert flash.convert_mask(None) is None
    mask = torch.tensor([True, False])
    assert flash.convert_mask(mask) is mask
    converted = flash.convert_mask(torch.tensor([0.0, -999.0, -1000.0, -torch.inf]))
    assert converted is not None
    assert converted.tolist() == [False, False, True, True]


@pytest.mark.parametrize("chunk_size", [1, 8, 20, 34, 100])
@pytest.mark.parametrize("is_causal", [False, True])
def test_chunks(chunk_size: int, is_causal: bool, device: Device) -> None:
    inputs = qkv(device.type, dtype=torch.float16)
    if device.has_kernels and chunk_size == 1:
        pytest.skip("34 launches are slow in the simulator, and show nothing that 8 keys don't")
    out = run(device, flash.flash_attention_chunked, *inputs, chunk_size=chunk_size, is_causal=is_causal)
    check(out, inputs, {"is_causal": is_causal})


def test_chunks_have_gradients() -> None:
    inputs = qkv(grad=True)
    out = flash.flash_attention_chunked(*inputs, chunk_size=7, is_causal=True)
    expected = flash.flash_attention(*inputs, is_causal=True)
    grads, expected_grads = (torch.autograd.grad(result.square().sum(), inputs) for result in (out, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [300, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_heads(head_dim: int, dtype: torch.dtype, device: Device) -> None:
    inputs = [random(1, 2, length, head_dim, dtype=dtype, device=device.type, grad=True) for length in (21, 34, 34)]
    out_grad = random(1, 2, 21, head_dim, dtype=dtype)
    with device.active():
        out = flash.flash_attention(*inputs, is_causal=True)
        grads = torch.autograd.grad(out, inputs, out_grad.to(device.type))
    check(out, inputs, {"is_causal": True})
    known = []
    for reference, wider in ((attention, torch.float64), (composition, torch.float32)):
        leaves = [tensor.detach().cpu().to(wider).requires_grad_() for tensor in inputs]
        known.append(torch.autograd.grad(reference(*leaves, is_causal=True)[0], leaves, out_grad.to(wider)))
    for grad, exact, plain in zip(grads, *known, strict=True):
        assert largest_error(grad.cpu(), exact) <= tolerance(plain.to(dtype), exact, gradient=True)


# -- replace_sdpa ---------------------------------------------------------------------------------------------------


def test_replace_sdpa_keeps_sdpas_meaning(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float masks stay what they are (T5, ALiBi), True attends, grouped heads need no flag; and it can be undone."""
    query, key, value = random(2, 4, 40, 32), random(2, 2, 40, 32), random(2, 2, 40, 32)
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    masks = [None, torch.rand(40, 40) < 0.7, random(4, 40, 40)]
    expected = [scaled_dot_product_attention(query, *repeated, mask) for mask in masks]
    query, key, value = (tensor.to(device.type) for tensor in (query, key, value))
    taken: list[bool] = []
    original = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *a: (taken.append(True), original(*a))[1])
    with device.active(), torch.no_grad():
        handle = flash.replace_sdpa(cpu=device.name == "cpu")
        for mask, exact in zip(masks, expected, strict=True):
            mask = mask if mask is None else mask.to(device.type)
            out = scaled_dot_product_attention(query, key, value, mask)
            torch.testing.assert_close(out.cpu(), exact)  # by us, or by ATen with the heads repeated
        assert len(taken) >= 1 if device.has_kernels else 3
        taken.clear()
        short = query[:, :, :31]
        scaled_dot_product_attention(short, *(tensor[:, :, :31].repeat_interleave(2, dim=1) for tensor in (key, value)))
        assert not taken  # below MFA_MIN_SEQ
        handle.remove()
        with pytest.raises(RuntimeError):
            scaled_dot_product_attention(query, key, value)
    assert not sdpa.is_enabled()
    handle.remove()


def test_replace_sdpa_takes_one_head_without_its_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFA_MIN_SEQ", "4")
    query, key, value = (random(3, 5, 32) for _ in range(3))
    expected = scaled_dot_product_attention(query, key, value)
    handle = flash.replace_sdpa(cpu=True)
    try:
        torch.testing.assert_close(scaled_dot_product_attention(query, key, value), expected)
    finally:
        handle.remove()


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        flash.flash_attention(*qkv(), scale=scale)


def test_scale_far_from_the_usual_warns() -> None:
    with pytest.warns(UserWarning, match="very different from default"):
        flash.flash_attention(*qkv(), scale=1000.0)


def test_a_scale_close_to_the_usual_counts() -> None:
    inputs = [5 * tensor for tensor in qkv(key_heads=4)]
    scale = 1 / math.sqrt(32) + 9e-7  # that package took it for the usual one
    assert not torch.equal(flash.flash_attention(*inputs, scale=scale), flash.flash_attention(*inputs))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda q, k, v: flash.flash_attention(q[0], k, v), RuntimeError, "query must be 4D"),
        (lambda q, k, v: flash.flash_attention(q, k, v, window_size=-1), ValueError, "window_size is -1"),
        *(
            (
                lambda q, k, v, size=size: flash.flash_attention(q, k, v, attn_mask=torch.ones(size) > 0),
                ValueError,
                text,
            )
            for size in ((34,), (3, 34), (21, 17), (7, 21, 34), (1, 3, 21, 34), (1, 1, 1, 1, 1))
            for text in ("^attn_mask shape mismatch", "must be 4D")
        ),
        (lambda q, k, v: flash.flash_attention(q, k[:, :1].repeat(1, 3, 1, 1), v), ValueError, "heads"),
        (lambda q, k, v: flash.flash_attention_chunked(q, k, v, chunk_size=0), ValueError, "chunk_size is 0"),
        (lambda q, k, v: flash.flash_attention_with_bias(q, k, v, k), ValueError, "attn_bias has shape"),
        (lambda q, k, v: flash.flash_attention_with_bias(q, k, v, k[0, 0]), ValueError, "attn_bias has 2 dimensions"),
        (lambda q, k, v: flash.flash_attention_with_bias(q, k, v, k > 0), TypeError, "attn_bias has dtype bool"),
        (lambda q, k, v: flash.flash_attention_int8(q, k, v, k, v), TypeError, "key has dtype float32"),
        (lambda q, k, v: flash.flash_attention_quantized(q, k, v, k, v, 7), ValueError, "quant_type is 7"),
        (lambda q, k, v: flash.quantize_kv_nf4(k[..., :31], v), ValueError, "key has head dimension 31"),
        (lambda q, k, v: flash.quantize_kv_int8(k[0], v), ValueError, "key has 3 dimensions"),
    ],
)
def test_errors(call: Callable[..., Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call(*qkv())


def test_bf16_backward_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    _log.said.clear()
    with caplog.at_level(logging.INFO, "mfa"):
        flash.flash_attention(*qkv(), bf16_backward=True)
    assert "bf16_backward has no effect" in caplog.text


def test_bf16_backward_compiles() -> None:
    """Although it logs."""
    torch._dynamo.reset()
    compiled = torch.compile(flash.flash_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*qkv(), bf16_backward=True), flash.flash_attention(*qkv()))


@pytest.mark.skipif(mfa.is_available(), reason="has Metal kernels")
def test_precompile_needs_metal() -> None:
    with pytest.raises(RuntimeError, match="Metal"):
        flash.precompile()
