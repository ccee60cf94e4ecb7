"""Second derivatives of mfa.attention: numerical, and against float64, with every feature."""

import logging
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from torch import Tensor

import mfa
from mfa import _log

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (2, -1)},  # the first rows see nothing
    "softcap": {"softcap": 1.5},
    "bias": {"attn_mask": (1, 4, 1, 6)},
    "masking bias": {"attn_mask": "-inf"},
    "bool mask": {"attn_mask": "bool"},
    "sinks": {"sinks": True, "window": (2, -1)},
    "dropout": {"dropout_p": 0.3},
    "everything": {"attn_mask": "-inf", "softcap": 2.0, "sinks": True, "alibi_slopes": True, "window": (3, 1)},
}


def problem(kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the other arguments; grouped heads, Lq 5, Lk 6."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    terms = dict(FEATURES[kind])
    tensors = {"query": normal(2, 4, 5, 3), "key": normal(2, 2, 6, 3), "value": normal(2, 2, 6, 2)}
    match terms.pop("attn_mask", None):
        case None:
            pass
        case "bool":
            tensors["attn_mask"] = normal(2, 1, 5, 6) > -0.5
        case "-inf":
            mask = normal(2, 1, 5, 6)
            mask[0, 0, 2] = mask[1, 0, :, 3] = -torch.inf
            tensors["attn_mask"] = mask
        case shape:
            tensors["attn_mask"] = normal(*shape)
    if terms.pop("sinks", False):
        tensors["sinks"] = normal(4)
    if terms.pop("alibi_slopes", False):
        tensors["alibi_slopes"] = normal(2, 4).abs().float()
    return tensors, terms


@pytest.mark.parametrize("kind", FEATURES)
def test_gradgradcheck(kind: str) -> None:
    """In float64, so without what is float32 always: ALiBi slopes and the log-sum-exp."""
    tensors, terms = problem(kind, torch.float64)
    names = [name for name, x in tensors.items() if x.dtype == torch.float64]
    rest = {name: x for name, x in tensors.items() if name not in names}
    masked = tensors.get("attn_mask", torch.zeros(1)).isinf()
    if masked.any():  # numerical differentiation can't take an infinite step
        tensors["attn_mask"] = tensors["attn_mask"].masked_fill(masked, 0)

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True))
        if masked.any():
            given["attn_mask"] = given["attn_mask"].masked_fill(masked, -torch.inf)
        torch.manual_seed(0)
        return mfa.attention(**given, **rest, **terms, enable_gqa=True)

    leaves = tuple(tensors[name].requires_grad_() for name in names)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_gradgradcheck_of_packed_sequences() -> None:
    """One sequence has no keys, one no queries, and the last row belongs to none."""
    generator = torch.Generator().manual_seed(0)
    leaves = tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((9, 4, 3), (8, 2, 3), (8, 2, 2), (4,))
    )
    starts = (torch.tensor([0, 3, 5, 5, 8], dtype=torch.int32), torch.tensor([0, 4, 4, 5, 8], dtype=torch.int32))
    slopes = torch.rand(4, 4, generator=generator)

    def function(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        terms: dict[str, Any] = {"sinks": inputs[3], "alibi_slopes": slopes, "window": (3, 1), "softcap": 2.0}
        return mfa.attention_varlen(*inputs[:3], *starts, 4, 4, dropout_p=0.2, **terms)

    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("slopes", [torch.rand(4), torch.rand(2, 4)], ids=["heads", "sequences"])
def test_packed_sequences_equal_single_ones(device: Device, slopes: Tensor) -> None:
    """Every second derivative, of slopes and of what came with the gradients of lse as well; float32."""
    lengths_q, lengths_k = (3, 5), (4, 6)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"query": (4, 8, 3), "key": (2, 10, 3), "value": (2, 10, 2), "sinks": (4,)}.items()
    }
    tensors["alibi_slopes"] = slopes
    terms: dict[str, Any] = {"window": (3, 1), "softcap": 2.0}

    def packed(query: Tensor, key: Tensor, value: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        starts = (torch.tensor(x, dtype=torch.int32, device=query.device) for x in ([0, 3, 8], [0, 4, 10]))
        rows = (x.transpose(0, 1) for x in (query, key, value))
        out, lse = mfa.attention_varlen(*rows, *starts, 5, 6, **rest, **terms, return_lse=True)
        return out.transpose(0, 1), lse

    def single(query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(query.split(lengths_q, 1), key.split(lengths_k, 1), value.split(lengths_k, 1), strict=True)
        results = [
            mfa.attention(
                *(x[None] for x in part),
                alibi_slopes=alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[index],
                sinks=sinks,
                enable_gqa=True,
                return_lse=True,
                **terms,
            )
            for index, part in enumerate(parts)
        ]
        return tuple(torch.cat([x[0] for x in each], 1) for each in zip(*results, strict=True))  # type: ignore[return-value]

    with device.active():
        moved = {name: tensor.to(device.type) for name, tensor in tensors.items()}
        found = second_derivatives(packed, moved, torch.float32)
    expected = second_derivatives(single, tensors, torch.float32)
    for name, grad in found.items():
        torch.testing.assert_close(grad.cpu(), expected[name], rtol=1e-4, atol=1e-4)


def second_derivatives(function: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a weighted sum of the gradients of every input through out and lse, by the inputs and what came with them."""
    generator = torch.Generator().manual_seed(1)

    def weight(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device)

    leaves = {
        name: x if x.dtype == torch.bool else x.detach().to(dtype).requires_grad_() for name, x in tensors.items()
    }
    out, lse = function(**leaves)
    coefficients = {"grad_out": weight(out).requires_grad_(), "grad_lse": weight(lse).requires_grad_()}
    inputs = {name: x for name, x in leaves.items() if x.requires_grad}
    firsts = torch.autograd.grad((out, lse), list(inputs.values()), list(coefficients.values()), create_graph=True)
    objective = sum((first * weight(first)).sum() for first in firsts)
    everything = {**inputs, **coefficients}
    found = torch.autograd.grad(objective, list(everything.values()))  # type: ignore[arg-type]
    return dict(zip(everything, found, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in FEATURES if kind != "dropout"])
def test_against_float64(device: Device, kind: str) -> None:
    """Every second derivative in float32 obeys the numerics rule, through out and lse."""
    tensors, terms = problem(kind, torch.float32)

    def reference(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (leaves.pop(name) for name in ("query", "key", "value"))
        bias, sinks = leaves.pop("attn_mask", None), leaves.pop("sinks", None)
        if bias is not None and bias.dtype != torch.bool:  # its -inf times 0 is a NaN in plain PyTorch
            hidden = bias.isinf()
            scores, seen = oracle.logits(q, k, bias=bias.masked_fill(hidden, 0), **leaves, **terms)
            seen = seen & ~hidden
        else:
            scores, seen = oracle.logits(q, k, bias=bias, **leaves, **terms)
        sees = seen.any(-1)
        if sinks is None:  # a row that sees nothing has no softmax to differentiate
            seen = seen | ~sees[..., None]
        probability, lse = oracle.weights(scores, seen, sinks)
        out = torch.einsum("bhij,bhjd->bhid", probability, v.repeat_interleave(2, dim=1))
        return (out, lse) if sinks is not None else (out * sees[..., None], lse.masked_fill(~sees, 0))

    with device.active():
        found = second_derivatives(
            lambda **leaves: mfa.attention(**leaves, **terms, enable_gqa=True, return_lse=True),
            {name: x.to(device.type) for name, x in tensors.items()},
            torch.float32,
        )
    plain, expected = (second_derivatives(reference, tensors, dtype) for dtype in (torch.float32, torch.float64))
    for name, grad in found.items():
        bound = oracle.tolerance(plain[name], expected[name], gradient=True)
        assert oracle.largest_error(grad.cpu(), expected[name]) <= bound, name


def test_third_derivative() -> None:
    tensors, _ = problem("plain", torch.float64)

    def function(query: Tensor) -> Tensor:
        out = mfa.attention(query, tensors["key"], tensors["value"], enable_gqa=True)
        (grad,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
        return grad

    assert torch.autograd.gradgradcheck(function, (tensors["query"].requires_grad_(),), fast_mode=True)


def test_through_torch_func() -> None:
    """The Hessian by torch.func equals that of the composition that has no op."""
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))

    def hessian(function: Any) -> Tensor:
        def scalar(q: Tensor) -> Tensor:
            return function(q).square().sum()

        result: Tensor = torch.func.jacrev(torch.func.grad(scalar))(query)
        return result

    expected = hessian(lambda q: oracle.attention(q, key, value, is_causal=True)[0])
    torch.testing.assert_close(hessian(lambda q: mfa.attention(q, key, value, is_causal=True)), expected)


def test_nothing_to_see_and_empty() -> None:
    for lengths in ((3, 0), (0, 3)):
        query, key, value = (torch.randn(1, 2, n, 4).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
        out = mfa.attention(query, key, value)
        firsts = torch.autograd.grad(out.sum(), (query, key, value), create_graph=True)
        sum(first.sum() for first in firsts).backward()  # type: ignore[union-attr]
        assert query.grad is not None
        assert not query.grad.any()


def test_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    _log.said.clear()
    query = torch.randn(1, 1, 3, 4).requires_grad_()
    with caplog.at_level(logging.WARNING, logger="mfa"):
        for _ in range(2):
            (grad,) = torch.autograd.grad(mfa.attention(query, query, query).sum(), query, create_graph=True)
            grad.sum().backward()
    assert [record.getMessage() for record in caplog.records] == [
        "second derivatives of attention have no kernel: ATen computes them on whole Lq x Lk matrices"
    ]
