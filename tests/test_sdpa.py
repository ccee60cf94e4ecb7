"""F.scaled_dot_product_attention through mfa.sdpa: what is routed, what isn't, and that both are right."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Device
from functorch.compile import make_boxed_func
from oracle import attention, composition, largest_error, tolerance
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa
from torch.utils._pytree import tree_map

import mfa
from mfa import sdpa

Inputs = tuple[Tensor, Tensor, Tensor]
MATH_FIRST = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]


@pytest.fixture(autouse=True)
def nothing_active() -> Iterator[None]:
    assert not sdpa.is_enabled()
    yield
    sdpa.disable()


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call that mfa took."""
    calls: list[tuple[Any, ...]] = []
    original = sdpa.attention

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(sdpa, "attention", count)
    return calls


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def qkv(device: str = "cpu", grad: bool = False) -> Inputs:
    torch.manual_seed(0)
    shape = {"device": device, "grad": grad}
    return random(2, 4, 20, 16, **shape), random(2, 4, 30, 16, **shape), random(2, 4, 30, 24, **shape)


def skip_unless_taken(*arguments: Any, **options: Any) -> None:
    """Skips, with the reasons, what the device can't do yet and therefore leaves to ATen."""
    reasons = sdpa.not_supported_reasons(*arguments, **options)
    if reasons:
        pytest.skip("; ".join(reasons))


# -- activation -----------------------------------------------------------------------------------------------------


def test_importing_registers_and_activates_nothing() -> None:
    assert "MFA" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() != "MFA"


def test_torch_activates_and_restores(routed: list[Any]) -> None:
    query, key, value = qkv()
    for count in (1, 2):
        torch_attention.activate_flash_attention_impl("MFA")
        torch_sdpa(query, key, value)  # cpu tensors are ATen's until asked for
        with mfa.simulate(counters=False):
            torch_sdpa(query, key, value)
        assert len(routed) == count
        torch_attention.restore_flash_attention_impl()
        assert not sdpa.is_enabled()
        with mfa.simulate(counters=False):
            torch_sdpa(query, key, value)
        assert len(routed) == count


def test_enable_and_disable(routed: list[Any]) -> None:
    query, key, value = qkv()
    sdpa.disable()
    sdpa.enable(cpu=True)
    assert torch_attention.current_flash_attention_impl() == "MFA"
    torch_sdpa(query, key, value)
    sdpa.disable()
    assert torch_attention.current_flash_attention_impl() is None
    torch_sdpa(query, key, value)
    assert len(routed) == 1


def test_enabled_gives_back_what_was_active(routed: list[Any]) -> None:
    query, key, value = qkv()
    with sdpa.enabled():
        with sdpa.enabled(cpu=True):
            torch_sdpa(query, key, value)
        assert sdpa.is_enabled()
        torch_sdpa(query, key, value)
        assert len(routed) == 1
    removed = []

    class Other:
        def remove(self) -> None:
            removed.append(self)

    torch_attention.register_flash_attention_impl("other", register_fn=Other)
    torch_attention.activate_flash_attention_impl("other")
    with sdpa.enabled(cpu=True):
        assert len(removed) == 1
        torch_sdpa(query, key, value)
    assert torch_attention.current_flash_attention_impl() == "other"
    torch_attention.restore_flash_attention_impl()
    assert len(routed) == 2


def test_without_restore_in_torch(routed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.10, whose registry can't undo an activation."""
    monkeypatch.delattr(torch_attention, "restore_flash_attention_impl")
    query, key, value = qkv()
    for count in (1, 2):
        with sdpa.enabled(cpu=True):
            torch_sdpa(query, key, value)
        torch_sdpa(query, key, value)
        assert len(routed) == count


# -- what is routed -------------------------------------------------------------------------------------------------


def test_forward_and_backward(device: Device, routed: list[Any]) -> None:
    query, key, value = inputs = qkv(device.type, grad=True)
    grad_out = random(2, 4, 20, 24, device=device.type)
    with device.active():
        with torch.inference_mode():
            skip_unless_taken(query, key, value, is_causal=True)
            with sdpa.enabled(cpu=device.name == "cpu"):
                alone = torch_sdpa(query, key, value, is_causal=True)
        assert len(routed) == 1
        left_to_aten = sdpa.not_supported_reasons(query, key, value, is_causal=True)
        with sdpa.enabled(cpu=device.name == "cpu"):
            out = torch_sdpa(query, key, value, is_causal=True)
            grads = torch.autograd.grad(out, inputs, grad_out)
        assert len(routed) == (1 if left_to_aten else 2), left_to_aten
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    plain = [tensor.detach().cpu().requires_grad_() for tensor in inputs]
    expected, _ = attention(*wide, is_causal=True)
    other, _ = composition(*plain, is_causal=True)
    assert largest_error(alone.cpu(), expected) <= tolerance(other, expected)
    assert largest_error(out.detach().cpu(), expected) <= tolerance(other, expected)
    for mine, theirs, exact in zip(
        grads,
        torch.autograd.grad(other, plain, grad_out.cpu()),
        torch.autograd.grad(expected, wide, grad_out.cpu().double()),
        strict=True,
    ):
        assert largest_error(mine.cpu(), exact) <= tolerance(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_opinfo_samples(dtype: torch.dtype, device: Device, routed: list[Any]) -> None:
    """PyTorch's own samples: values up to 9, so scores up to 200, broadcast batches, lengths 3 and 6, dropout."""
    if device.has_kernels and dtype == torch.float64:
        pytest.skip("the Metal kernels have no float64")
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    info = next(info for info in database if info.name == "nn.functional.scaled_dot_product_attention")
    samples = list(info.sample_inputs(device.type, dtype, requires_grad=True))
    for sample in samples:
        inputs, options = (sample.input, *sample.args), sample.kwargs
        with device.active(), sdpa.enabled(cpu=device.name == "cpu"):
            assert len(sdpa.not_supported_reasons(*inputs, **options)) <= (options["dropout_p"] != 0)
            torch.manual_seed(1)
            out = torch_sdpa(*inputs, **options)
            grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
            kept = kept_by_dropout(inputs, options)
        inputs, out, grads = (tree_map(lambda tensor: tensor.detach().cpu(), tree) for tree in (inputs, out, grads))
        options = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
        wide = [tensor.double().requires_grad_() for tensor in inputs]
        plain = [tensor.clone().requires_grad_() for tensor in inputs]
        expected = math_attention(*wide, kept=kept, **options)
        other = math_attention(*plain, kept=kept, **options)
        results = zip(
            (out, *grads),
            (other, *torch.autograd.grad(other, plain, torch.ones_like(other))),
            (expected, *torch.autograd.grad(expected, wide, torch.ones_like(expected))),
            strict=True,
        )
        for mine, theirs, exact in results:
            # As torch's test_transformers.py: its default tolerances, and the error of its own implementation, twice.
            rtol, atol = torch.testing._comparison.default_tolerances(dtype)
            atol += 2 * float((theirs.double() - exact).abs().max().detach())
            torch.testing.assert_close(mine.double(), exact, rtol=rtol, atol=atol)
    assert len(samples) >= 20
    assert len(routed) >= sum(sample.kwargs["dropout_p"] == 0 for sample in samples)


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


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "options"),
    [
        ((8, 20, 16), (8, 30, 16), {}),
        ((2, 1, 20, 16), (1, 3, 30, 16), {}),
        ((2, 6, 20, 16), (2, 2, 30, 16), {"enable_gqa": True}),
        ((2, 4, 20, 16), (2, 4, 30, 16), {"scale": 0.7}),
        ((2, 4, 20, 16), (2, 4, 30, 16), {"attn_mask": (20, 30)}),
        ((2, 4, 20, 16), (2, 4, 30, 16), {"attn_mask": (2, 1, 1, 30)}),
        ((4, 20, 16), (4, 30, 16), {"attn_mask": (4, 20, 30)}),
        ((2, 4, 0, 16), (2, 4, 30, 16), {}),
        ((2, 4, 20, 16), (2, 4, 0, 16), {}),
    ],
)
def test_same_as_aten(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], options: dict[str, Any], routed: list[Any]
) -> None:
    query, key, value = random(*query_shape), random(*key_shape), random(*key_shape)
    masks: list[Tensor | None] = [None]
    if "attn_mask" in options:
        masks = [random(*options["attn_mask"]), random(*options["attn_mask"]) > -1]
    for mask in masks:
        arguments = {**options, "attn_mask": mask}
        with sdpa.enabled(cpu=True):
            out = torch_sdpa(query, key, value, **arguments)
        torch.testing.assert_close(out, torch_sdpa(query, key, value, **arguments))
    assert len(routed) == len(masks)


def test_sdpa_kernel_is_respected(routed: list[Any]) -> None:
    query, key, value = qkv()
    with sdpa.enabled(cpu=True):
        for backends, set_priority, taken in (
            (SDPBackend.MATH, False, 0),
            ([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], False, 0),
            (MATH_FIRST, True, 0),
            (MATH_FIRST[::-1], True, 1),
            (MATH_FIRST, False, 1),
            (SDPBackend.FLASH_ATTENTION, False, 1),
        ):
            routed.clear()
            with sdpa_kernel(backends, set_priority=set_priority):
                torch_sdpa(query, key, value)
            assert len(routed) == taken, backends


@pytest.mark.parametrize("is_causal", [False, True])
def test_compile(is_causal: bool) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch_sdpa(query, key, value, is_causal=is_causal) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    for length in (20, 21, 37):
        query, key, value = inputs = tuple(random(2, 4, length, 16, grad=True) for _ in range(3))
        expected = torch_sdpa(query, key, value, is_causal=is_causal) * 2
        with sdpa.enabled(cpu=True):
            out = compiled(query, key, value)
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.sum(), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs), rtol=1e-4, atol=1e-5)
        with sdpa.enabled(cpu=True), torch.inference_mode():
            torch.testing.assert_close(compiled(query, key, value), expected.detach())
    forwards = [graph for graph in graphs if "mfa.attention_forward" in graph.code]
    assert len(forwards) == 2  # with gradients and without, each for every length
    assert not any("aten._scaled_dot_product" in graph.code for graph in graphs)


def test_export_keeps_the_aten_op(routed: list[Any]) -> None:
    class Module(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch_sdpa(query, key, value, is_causal=True)

    query, key, value = qkv()
    with sdpa.enabled(cpu=True):
        program = torch.export.export(Module(), (query, key, value))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.scaled_dot_product_attention.default]
    expected = program.module()(query, key, value)
    routed.clear()
    with sdpa.enabled(cpu=True):
        torch.testing.assert_close(program.module()(query, key, value), expected)
    assert len(routed) == 1


def test_autocast(routed: list[Any]) -> None:
    query, key, value = qkv()
    with sdpa.enabled(cpu=True), torch.autocast("cpu", torch.bfloat16):
        out = torch_sdpa(query, key, value)
    assert out.dtype == torch.bfloat16
    assert routed[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool, routed: list[Any]) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
    tokens, padding = random(2, 10, 32), torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 7:] = True
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    expected, _ = layer(tokens, tokens, tokens, **options)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with sdpa.enabled(cpu=True):
        out, _ = layer(tokens, tokens, tokens, **options)
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    assert len(routed) == (not need_weights)  # with weights, the module multiplies matrices itself


def test_transformer_encoder_layer(routed: list[Any]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    tokens = random(2, 10, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    expected = layer(tokens, src_mask=mask, is_causal=True)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with sdpa.enabled(cpu=True):
        out = layer(tokens, src_mask=mask, is_causal=True)
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        evaluated = layer.eval()(tokens, src_mask=mask, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(evaluated, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    assert len(routed) >= 1


# -- what isn't -----------------------------------------------------------------------------------------------------


def lower_right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_sdpa(query, key, value, causal_lower_right(query.shape[2], key.shape[2]))


REFUSED: dict[str, tuple[Callable[[Inputs], Any], str]] = {
    "head dimension": (lambda i: torch_sdpa(*(x.repeat(1, 1, 1, 32) for x in i)), "head dimension 512"),
    "rank": (lambda i: torch_sdpa(*(x[None] for x in i)), "5 dimensions"),
    "func.grad": (lambda i: torch.func.grad(lambda q: torch_sdpa(q, *i[1:]).sum())(i[0]), "torch.func"),
    "func.vmap over grad": (
        lambda i: torch.func.vmap(torch.func.grad(lambda q, k, v: torch_sdpa(q, k, v).sum()))(*i),
        "torch.func",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_goes_to_aten_and_says_why_once(name: str, routed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    call, reason = REFUSED[name]
    inputs = qkv()
    expected = call(inputs)
    sdpa._logged.clear()
    with sdpa.enabled(cpu=True), caplog.at_level(logging.WARNING, "mfa"):
        for _ in range(2):
            torch.testing.assert_close(call(inputs), expected)
    assert not routed
    assert [reason in record.message for record in caplog.records] in ([True], [])
    assert caplog.records or "vmap" in name  # vmap has a rule of its own for the aten op


def test_errors_are_those_of_aten(routed: list[Any]) -> None:
    query, key, value = qkv()
    bad: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((query, key.half(), value), {}),
        ((query, key, value[:, :, 1:]), {}),
        ((query, key, value, torch.zeros(20, 30)), {"is_causal": True}),
        ((query, key[:, :2], value[:, :2]), {}),
    ]
    for arguments, options in bad:
        with pytest.raises(RuntimeError) as expected:
            torch_sdpa(*arguments, **options)
        with sdpa.enabled(cpu=True), pytest.raises(RuntimeError) as error:
            torch_sdpa(*arguments, **options)
        assert str(error.value).splitlines()[0] == str(expected.value).splitlines()[0]
    assert not routed


def test_subclasses_go_to_aten(routed: list[Any]) -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    inputs = [two_tensor(tensor, tensor.clone()) for tensor in qkv()]
    with sdpa.enabled(cpu=True):
        out = torch_sdpa(*inputs)
    assert isinstance(out, two_tensor)
    with sdpa.enabled(cpu=True):
        torch.testing.assert_close(lower_right(*qkv()), lower_right(*qkv()))
    assert len(routed) == 2  # a CausalBias makes a mask, or calls itself, before


def test_nested_tensors_are_left_alone(routed: list[Any]) -> None:
    query, key, value = (torch.nested.nested_tensor([random(3, 8, 16), random(3, 5, 16)]) for _ in range(3))
    expected = torch_sdpa(query, key, value)
    with sdpa.enabled(cpu=True):
        out = torch_sdpa(query, key, value)
    for mine, theirs in zip(out.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not routed


# -- varlen_attn ----------------------------------------------------------------------------------------------------


@pytest.fixture
def varlen() -> Any:
    from torch.nn.attention import varlen

    if not hasattr(torch.ops.mfa, "attention_varlen_forward"):
        pytest.skip("this build of libmfa has no mfa::attention_varlen_forward")
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
    if not hasattr(torch.ops.mfa, "attention_decode"):
        pytest.skip("this build of libmfa has no mfa::attention_decode")
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


# -- what users of other attentions ran into -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_causal_leaks_nothing_from_the_future_pytorch_195910(device: Device, dtype: torch.dtype) -> None:
    query, key, value = (random(1, 2, 70, 64, dtype=dtype, device=device.type) for _ in range(3))
    with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
        skip_unless_taken(query, key, value, is_causal=True)
        out = torch_sdpa(query, key, value, is_causal=True)
        for tensor in (key, value):
            tensor[:, :, 41:] = 100 * tensor[:, :, 41:].flip(2)
        assert torch.equal(torch_sdpa(query, key, value, is_causal=True)[:, :, :41], out[:, :, :41])


def test_more_than_2_to_the_32_scores_pytorch_179352() -> None:
    """And the 15,000 rows of h3.c#16: nothing counts scores in 32 bits. A window keeps the test short."""
    length = 66_000
    query, key, value = (random(1, 1, length, 8) for _ in range(3))
    out = mfa.attention(query, key, value, window=(40, 0))
    rows = slice(length - 64, length)
    part = [tensor[:, :, length - 128 :] for tensor in (query, key, value)]
    expected, _ = attention(*part, window=(40, 0))
    assert largest_error(out[:, :, rows], expected[:, :, 64:]) <= 1e-5


def test_gqa_decode_reads_in_bounds_pytorch_174861_transformers_44359(device: Device, routed: list[Any]) -> None:
    """The simulator checks bounds. And pytorch#149132, a crash for grouped heads."""
    query = random(2, 8, 1, 64, dtype=torch.float16, device=device.type)
    key, value = (random(2, 2, 65, 64, dtype=torch.float16, device=device.type) for _ in range(2))
    with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
        out = torch_sdpa(query, key, value, enable_gqa=True)
    inputs = [tensor.cpu() for tensor in (query, key, value)]
    expected, _ = attention(*inputs)
    assert largest_error(out.cpu(), expected) <= tolerance(composition(*inputs)[0], expected)
    assert len(routed) == 1


def test_permuted_inputs_pytorch_181133_comfyui_10681(device: Device, routed: list[Any]) -> None:
    """B,L,H,D in memory, D not last in memory, slices, expanded heads."""
    rows = random(2, 40, 3, 2, 32, dtype=torch.float16, device=device.type)  # [B,L,3,H,D], of one projection
    variants = [
        [rows[:, :, i].transpose(1, 2) for i in range(3)],
        [rows[:, 1:, i].permute(0, 2, 3, 1).contiguous().transpose(-1, -2) for i in range(3)],
        [rows[:, :, i, :1].transpose(1, 2).expand(-1, 2, -1, -1) for i in range(3)],
        [rows[:, ::2, i, :, 1:17].transpose(1, 2) for i in range(3)],
    ]
    for inputs in variants:
        with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
            out = torch_sdpa(*inputs, is_causal=True)
            assert torch.equal(out, torch_sdpa(*(tensor.contiguous() for tensor in inputs), is_causal=True))
        inputs = [tensor.cpu() for tensor in inputs]
        expected, _ = attention(*inputs, is_causal=True)
        assert largest_error(out.cpu(), expected) <= tolerance(composition(*inputs, is_causal=True)[0], expected)
    assert len(routed) == 2 * len(variants)


def test_value_dimension_decides_the_shape_pytorch_176767(device: Device, routed: list[Any]) -> None:
    query, key = (random(2, 3, 9, 64, dtype=torch.float16, device=device.type) for _ in range(2))
    for dim in (32, 128):
        value = random(2, 3, 9, dim, dtype=torch.float16, device=device.type)
        with device.active(), torch.no_grad(), sdpa.enabled(cpu=device.name == "cpu"):
            assert torch_sdpa(query, key, value).shape == (2, 3, 9, dim)
    assert len(routed) == 2


def test_fully_masked_rows_are_zero_pytorch_157727_167515(device: Device) -> None:
    query, key, value = inputs = qkv(device.type, grad=True)
    seen = torch.ones(20, 30, dtype=torch.bool)
    seen[3:5] = False
    bias = torch.zeros(20, 30).masked_fill(~seen, -torch.inf)
    for mask in (seen.to(device.type), bias.to(device.type)):
        with device.active(), sdpa.enabled(cpu=device.name == "cpu"):
            skip_unless_taken(query, key, value, mask)
            out = torch_sdpa(query, key, value, mask)
            grads = torch.autograd.grad(out.sum(), inputs)
        assert (out[:, :, 3:5] == 0).all()
        assert (grads[0][:, :, 3:5] == 0).all()
        assert all(tensor.isfinite().all() for tensor in (out, *grads))


def test_new_lengths_need_no_new_kernels_pytorch_152550_181213_152344() -> None:
    seen = set()
    with mfa.simulate(counters=False) as simulation, sdpa.enabled(), torch.no_grad():
        for length in range(40, 56):
            query, key, value = (random(1, 1, length, 64, dtype=torch.float16) for _ in range(3))
            torch_sdpa(query, key, value, is_causal=True)
        for launch in simulation.launches:
            seen.add((launch.kernel, *launch.constants.items()))
    assert len(simulation.launches) >= 16
    assert len(seen) <= 2
