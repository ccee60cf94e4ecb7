"""PyTorch's own samples of scaled_dot_product_attention, and of modules that call it, at torch's tolerances."""

from typing import Any

import pytest
import torch
from conftest import Device
from sdpa_cases import check_nothing_active, count_routed  # noqa: F401 (fixtures)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa
from torch.utils._pytree import tree_map

from mfa import sdpa


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_opinfo_samples(dtype: torch.dtype, device: Device, routed: list[Any]) -> None:
    """PyTorch's own samples: values up to 9, so scores up to 200, broadcast batches, lengths 3 and 6, dropout."""
    if device.has_kernels and dtype == torch.float64:
        pytest.skip("the Metal kernels have no float64")
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    info = next(info for info in database if info.name == "nn.functional.scaled_dot_product_attention")
    torch.manual_seed(0)
    samples = list(info.sample_inputs(device.type, dtype, requires_grad=True))
    for sample in samples:
        inputs, options = (sample.input, *sample.args), sample.kwargs
        with device.active(), sdpa.enabled(cpu=device.name == "cpu"):
            assert not sdpa.not_supported_reasons(*inputs, **options)
            torch.manual_seed(1)
            out = torch_sdpa(*inputs, **options)
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
            kept = kept_by_dropout(inputs, options)
        inputs, out, grads = (tree_map(lambda tensor: tensor.detach().cpu(), tree) for tree in (inputs, out, grads))
        options = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
        if options.pop("enable_gqa", False):  # which samples have since torch 2.14
            assert inputs[0].shape[-3] == inputs[1].shape[-3], "the references below have no groups"
        wide = [tensor.double().requires_grad_() for tensor in inputs]
        plain = [tensor.clone().requires_grad_() for tensor in inputs]
        expected = math_attention(*wide, kept=kept, **options)
        # As torch's test_transformers.py: its default tolerances, and a multiple of the error of torch's own
        # implementations in the dtype. Its factors for fused kernels go up to 8, and 1.75 more with dropout; on the
        # CPU, where half types are computed in float32, we keep to 2.
        exact = with_gradients(expected, wide)
        errors = largest_errors(with_gradients(math_attention(*plain, kept=kept, **options), plain), exact)
        factor = 1.0 if kept is None else 1.75
        if device.has_kernels:
            options["dropout_p"] = 0.0  # which torch's fused kernel doesn't have
            fused = with_gradients(flash_attention(*plain, **options), plain)
            undropped = with_gradients(math_attention(*wide, kept=None, **options), wide)
            errors = [max(pair) for pair in zip(errors, largest_errors(fused, undropped), strict=True)]
        factor *= 8 if device.has_kernels else 2
        # Where one key dominates a row, torch's own gradients of query and key are exact: P is 1, and dP - delta is 0.
        # Kernels have delta from out, so that one rounding of a sum of products with the value remains.
        query, key, value = (tensor.detach().abs() for tensor in inputs)
        rounding = 0.0
        if device.has_kernels:
            kept_sum = float(value.float().sum(-1).max()) * (1 if kept is None else 2)  # dropout_p is 0.5
            scale = query.shape[-1] ** -0.5
            rounding = torch.finfo(torch.float32).eps * kept_sum * scale * float(max(query.max(), key.max()))
        rtol, atol = torch.testing._comparison.default_tolerances(dtype)
        for mine, reference, error in zip((out, *grads), exact, errors, strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=rtol, atol=atol + factor * error + rounding)
    assert len(samples) >= 20
    assert len(routed) >= len(samples)


def test_opinfo_gradients() -> None:
    """As torch's TestBwdGradients.test_fn_grad: numerical differentiation in float64."""
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    info = next(info for info in database if info.name == "nn.functional.scaled_dot_product_attention")

    def call(*inputs: Tensor, options: dict[str, Any]) -> Tensor:
        torch.manual_seed(1)  # the same dropout in each call
        return torch_sdpa(*inputs, **options)

    with sdpa.enabled(cpu=True):
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
            inputs, options = (sample.input, *sample.args), dict(sample.kwargs)
            mask = options.pop("attn_mask", None)
            if mask is not None:
                inputs = (*inputs, mask)

            def function(*tensors: Tensor, options: dict[str, Any] = options) -> Tensor:
                extra = {"attn_mask": tensors[3]} if len(tensors) > 3 else {}
                return call(*tensors[:3], options={**options, **extra})

            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name",
    ["MultiheadAttention", "TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer", "Transformer"],
)
def test_module_samples(name: str, training: bool, routed: list[Any]) -> None:
    """ModuleInfo's: outputs and gradients in float64, with masks of all kinds, against torch's math."""
    database = pytest.importorskip("torch.testing._internal.common_modules").module_db
    info = next(info for info in database if info.name == f"nn.{name}")
    samples = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
    assert len(samples) >= 20
    for sample in samples:
        module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()
        module.train(training)
        for part in module.modules():  # whose random numbers are others
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            elif isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        options = dict(sample.forward_input.kwargs)
        if name == "MultiheadAttention":
            options["need_weights"] = False  # for which it calls no function but this
        leaves = [*module.parameters(), *(x for x in sample.forward_input.args if isinstance(x, Tensor))]

        def run(module: Any = module, sample: Any = sample, options: Any = options, leaves: Any = leaves) -> Any:
            out = module(*sample.forward_input.args, **options)
            out = out[0] if isinstance(out, tuple) else out
            return with_gradients(out, leaves)

        with sdpa_kernel(SDPBackend.MATH):
            expected = run()
        routed.clear()
        with sdpa.enabled(cpu=True):
            torch.testing.assert_close(run(), expected)
        assert routed


def with_gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
    return (out.detach(), *(grad for grad in grads if grad is not None))


def largest_errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [float((mine.double() - reference).abs().max()) for mine, reference in zip(results, exact, strict=True)]


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float,
    is_causal: bool,
    kept: Tensor | None,
) -> Tensor:
    """By torch's math, except for dropout, of which the outcome is given."""
    if kept is None:
        mask = attn_mask if attn_mask is None else attn_mask.detach().to(query.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            return torch_sdpa(query, key, value, mask, is_causal=is_causal)
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key, value)]
    scores = wide[0] @ wide[1].transpose(-1, -2) / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return ((scores.softmax(-1) * kept / (1 - dropout_p)) @ wide[2]).to(query.dtype)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, dropout_p: float, is_causal: bool
) -> Tensor:
    """By torch's fused kernel for CPUs."""
    assert dropout_p == 0
    batch = max(tensor.shape[0] if tensor.dim() == 4 else 1 for tensor in (query, key, value))
    rank = max(tensor.dim() for tensor in (query, key, value))
    tensors = [tensor.expand(batch, *tensor.shape[-3:]) for tensor in (query, key, value)]
    mask = attn_mask if attn_mask is None else attn_mask.detach()
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = function(*tensors, is_causal=is_causal, attn_mask=mask)[0]
    return out if rank == 4 else out.squeeze(0)


def kept_by_dropout(inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor | None:
    """Which probabilities dropout leaves, for the seed 1: the identity as value shows them.

    Probabilities are made alike, since small ones round to 0 whether dropped or not.
    """
    if options["dropout_p"] == 0:
        return None
    query, key, _ = inputs
    identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device).expand(*key.shape[:-1], -1)
    torch.manual_seed(1)
    shown = torch_sdpa(torch.zeros_like(query), key, identity, **options)
    return shown.cpu() != 0
