"""F.scaled_dot_product_attention through mfa.sdpa: what is routed, what isn't, and that both are right."""

import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Device
from functorch.compile import make_boxed_func
from oracle import attention, composition, largest_error, tolerance
from sdpa_cases import (  # noqa: F401 (fixtures)
    Inputs,
    check_nothing_active,
    count_routed,
    qkv,
    random,
    skip_unless_taken,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import mfa
from mfa import _log, sdpa

MATH_FIRST = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]


undoes = pytest.mark.skipif(
    not hasattr(torch_attention, "restore_flash_attention_impl"),
    reason="this torch's registry can't undo an activation",
)


# -- activation -----------------------------------------------------------------------------------------------------


def test_importing_registers_and_activates_nothing() -> None:
    code = (
        "import mfa.sdpa; from torch.nn import attention; "
        "print('MFA' in attention.list_flash_attention_impls(), attention.current_flash_attention_impl())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "None"]


def test_activation_warns_of_nothing() -> None:
    """torch warns of a replaced kernel once per process."""
    code = "import mfa.sdpa; mfa.sdpa.enable(cpu=True); mfa.sdpa.disable()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.simulator
@undoes
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


@undoes
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


@undoes
def test_removing_a_handle_tells_torch(routed: list[Any]) -> None:
    handle = sdpa.activate(sdpa.Options(cpu=True))
    handle.remove()
    assert torch_attention.current_flash_attention_impl() is None
    assert not sdpa.is_enabled()
    torch_sdpa(*qkv())
    assert not routed


@undoes
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


REGISTRY = [name for name in dir(torch_attention) if name.endswith(("_flash_attention_impl", "_flash_attention_impls"))]


@pytest.mark.parametrize("missing", [["restore_flash_attention_impl"], REGISTRY], ids=["as in 2.10", "no registry"])
def test_without_torchs_registry(missing: list[str], routed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can't undo an activation, or isn't there, torch.library does the same."""
    for name in missing:
        monkeypatch.delattr(torch_attention, name, raising=False)
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
    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
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
        assert largest_error(mine.cpu(), exact) <= tolerance(theirs, exact, gradient=True)


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


FUNC: dict[str, Callable[[Inputs], Any]] = {
    "grad": lambda i: torch.func.grad(lambda q: torch_sdpa(q, *i[1:]).sin().sum())(i[0]),
    "vmap of grad": lambda i: torch.func.vmap(torch.func.grad(lambda q, k, v: torch_sdpa(q, k, v).sin().sum()))(*i),
    "Hessian": lambda i: torch.func.jacrev(torch.func.grad(lambda q: torch_sdpa(q, *i[1:]).sin().sum()))(i[0]),
}


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "batch": lambda q, k, v: torch.vmap(torch_sdpa)(q, k, v),
    "one batch for all": lambda q, k, v: torch.vmap(torch_sdpa, (0, None, None))(q, k[0], v[0]),
    "heads": lambda q, k, v: torch.vmap(torch_sdpa, 1, 1)(q, k, v),
    "twice": lambda q, k, v: torch.vmap(torch.vmap(torch_sdpa))(*(x.expand(3, *x.shape) for x in (q, k, v))),
    "causal": lambda q, k, v: torch.vmap(partial(torch_sdpa, is_causal=True))(q, k, v),
    "mapped mask": lambda q, k, v: torch.vmap(torch_sdpa)(q, k, v, visible(q, k)),
    "mapped mask alone": lambda q, k, v: torch.vmap(torch_sdpa, (None, None, None, 0))(q, k, v, visible(q, k)[:, None]),
    "grad": lambda q, k, v: torch.func.grad(lambda q: torch_sdpa(q, k, v).sin().sum())(q),
    "vjp": lambda q, k, v: torch.func.vjp(lambda k: torch_sdpa(q, k, v).sin(), k)[1](q.new_ones(2, 4, 20, 24))[0],
    "grad of vmap": lambda q, k, v: torch.func.grad(lambda q: torch.vmap(torch_sdpa)(q, k, v).sin().sum())(q),
    "vmap of value and grad": lambda q, k, v: torch.vmap(
        torch.func.grad_and_value(lambda q, k, v: torch_sdpa(q, k, v).sin().sum())
    )(q, k, v)[0],
}


def visible(query: Tensor, key: Tensor) -> Tensor:
    """A mask for each row of the batch, which hides no query from all keys."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(query.shape[0], query.shape[2], key.shape[2], generator=generator) > 0.3).to(query.device)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, device: Device, routed: list[Any]) -> None:
    """Of the aten op itself: torch.vmap decomposes it, and what torch.func wraps mps tensors in has other keys."""
    inputs = qkv(device.type)
    plain = [tensor.cpu() for tensor in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        composed = TRANSFORMS[name](*plain)
        expected = TRANSFORMS[name](*(tensor.double() for tensor in plain))
    with device.active(), sdpa.enabled(cpu=device.name == "cpu"):
        out = TRANSFORMS[name](*inputs).cpu()
    assert len(routed) == 1
    assert largest_error(out, expected) <= tolerance(composed, expected, gradient="grad" in name or name == "vjp")


def test_vmap_of_what_goes_to_aten_says_why_once(routed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    inputs = [tensor.repeat(1, 1, 1, 64) for tensor in qkv()]
    _log.said.clear()
    for _ in range(2):
        with sdpa.enabled(cpu=True), caplog.at_level(logging.WARNING, "mfa"):
            out = torch.vmap(torch_sdpa)(*inputs)
    torch.testing.assert_close(out, torch_sdpa(*inputs))
    assert not routed
    assert ["head dimension 1024" in record.message for record in caplog.records] == [True]


def test_vmap_asks_for_the_randomness_of_dropout(routed: list[Any]) -> None:
    """As ATen's does."""
    queries, keys, values = qkv()
    drop = partial(torch_sdpa, dropout_p=0.5)
    with sdpa.enabled(cpu=True):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(drop)(queries, keys, values)
        equal = queries[:1].expand_as(queries), keys[:1].expand_as(keys), values[:1].expand_as(values)
        same = torch.vmap(drop, randomness="same")(*equal)
        different = torch.vmap(drop, randomness="different")(*equal)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    assert len(routed) == 3


@pytest.mark.parametrize("name", FUNC)
def test_torch_func(name: str, routed: list[Any]) -> None:
    inputs = tuple(tensor[:, :2, :6].double() for tensor in qkv())
    with sdpa_kernel(SDPBackend.MATH):  # ATen's fused attentions have no second derivative
        expected = FUNC[name](inputs)  # type: ignore[arg-type]
    with sdpa.enabled(cpu=True):
        torch.testing.assert_close(FUNC[name](inputs), expected)  # type: ignore[arg-type]
    assert len(routed) == 1


# -- what isn't -----------------------------------------------------------------------------------------------------


def lower_right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_sdpa(query, key, value, causal_lower_right(query.shape[2], key.shape[2]))


REFUSED: dict[str, tuple[Callable[[Inputs], Any], str]] = {
    "head dimension": (lambda i: torch_sdpa(*(x.repeat(1, 1, 1, 64) for x in i)), "head dimension 1024"),
    "rank": (lambda i: torch_sdpa(*(x[None] for x in i)), "5 dimensions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_goes_to_aten_and_says_why_once(name: str, routed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    call, reason = REFUSED[name]
    inputs = qkv()
    expected = call(inputs)
    _log.said.clear()
    with sdpa.enabled(cpu=True), caplog.at_level(logging.WARNING, "mfa"):
        for _ in range(2):
            torch.testing.assert_close(call(inputs), expected)
    assert not routed
    assert [reason in record.message for record in caplog.records] == [True]


def test_forward_mode_goes_to_aten(routed: list[Any]) -> None:
    query, key, value = qkv()
    with sdpa_kernel(MATH_FIRST, set_priority=True):
        jvp = torch.func.jvp(lambda q: torch_sdpa(q, key, value), (query,), (query,))
        with sdpa.enabled(cpu=True):
            torch.testing.assert_close(torch.func.jvp(lambda q: torch_sdpa(q, key, value), (query,), (query,)), jvp)
    assert not routed
    with torch.autograd.forward_ad.dual_level():
        reasons = sdpa.not_supported_reasons(query, key, value)
    assert reasons == ["forward-mode differentiation is active, and mfa's ops don't support it"]


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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_dtensors_are_routed(routed: list[Any]) -> None:
    """On a mesh of one process; ring_cases.py has more."""
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        query, key, value = (distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in qkv())
        with sdpa.enabled(cpu=True):
            out = torch_sdpa(query, key, value, is_causal=True)
            (grad,) = torch.autograd.grad(out, query, grad_outputs=torch.ones_like(out))
        assert out.placements == grad.placements == (Shard(1),)
        torch.testing.assert_close(out.to_local(), torch_sdpa(*qkv(), is_causal=True))
    finally:
        distributed.destroy_process_group()
    assert len(routed) == 1


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_a_sparse_mask_is_refused_by_name(layout: str, routed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """ATen doesn't take it either."""
    mask = torch.ones(20, 30).tril().to_sparse(layout=getattr(torch, layout))
    _log.said.clear()
    for _ in range(2):
        with sdpa.enabled(cpu=True), caplog.at_level(logging.WARNING, "mfa"), pytest.raises(RuntimeError):
            torch_sdpa(*qkv(), mask)
    assert not routed
    (record,) = caplog.records
    assert f"attn_mask has layout {layout}" in record.message
