"""The ops inside torch.func: gradients, mapped gradients, and a refusal of what would silently be zero."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from torch import Tensor
from torch.autograd import forward_ad

import mfa

LENGTHS = (5, 0, 7)
STARTS = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
SINKS, SLOPES = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.1, 0.0, 0.3, 0.02])


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of [H,L,D], so that the inputs of all functions here look alike."""
    terms: dict[str, Any] = {"window": (6, 0), "softcap": 3.0, "sinks": SINKS.to(query), "enable_gqa": True}
    out = mfa.attention(query[None], key[None], value[None], alibi_slopes=SLOPES.to(query.device), **terms)
    return out.squeeze(0)


def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    packed = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    starts = STARTS.to(query.device)
    terms: dict[str, Any] = {"window": (6, 0), "softcap": 3.0, "sinks": SINKS.to(query)}
    out = mfa.attention_varlen(*packed, starts, starts, 7, 7, alibi_slopes=SLOPES.to(query.device), **terms)
    return out.transpose(0, 1)


def cached(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = mfa.attention_with_kv_cache(query[None, :, :1], key[None], value[None], cache_seqlens=9)
    return out.squeeze(0)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "dense": (dense, (12,)),
    "varlen": (varlen, LENGTHS),
}


def tensors(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, 12, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def reference(lengths: tuple[int, ...], attend: Any) -> Callable[..., Tensor]:
    """The same by the oracle, or the composition, sequence by sequence."""

    def function(*packed: Tensor) -> Tensor:
        terms = {"window": (6, 0), "softcap": 3.0, "sinks": SINKS.to(packed[0]), "alibi_slopes": SLOPES}
        sequences = zip(*(tensor.split(lengths, 1) for tensor in packed), strict=True)
        return torch.cat([attend(*(x[None] for x in each), **terms)[0][0] for each in sequences if each[0].numel()], 1)

    return function


def objective(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).sin().sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad(name: str, device: Device) -> None:
    function, lengths = FUNCTIONS[name]
    inputs = tensors(torch.float32, device.type)
    with device.active():
        grads = torch.func.grad(objective(function), (0, 1, 2))(*inputs)
    of_plain, of_exact = (
        torch.func.grad(objective(reference(lengths, attend)), (0, 1, 2))(*(x.cpu().to(dtype) for x in inputs))
        for attend, dtype in ((oracle.composition, torch.float32), (oracle.attention, torch.float64))
    )
    for grad, plain, exact in zip(grads, of_plain, of_exact, strict=True):
        assert oracle.largest_error(grad.cpu(), exact) <= oracle.tolerance(plain, exact, gradient=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_grad_and_grad_over_vmap(name: str) -> None:
    function, lengths = FUNCTIONS[name]
    query, *rest = tensors()
    queries = torch.stack([query, query.flip(1), -query])
    per_query = torch.func.grad(objective(function), (0, 1))
    expected = [
        torch.func.grad(objective(reference(lengths, oracle.attention)), (0, 1))(each, *rest) for each in queries
    ]
    mapped = torch.func.vmap(per_query, (0, None, None))(queries, *rest)
    for grad, exact in zip(mapped, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(grad, torch.stack(exact))

    def summed(queries: Tensor, key: Tensor) -> Tensor:
        return torch.func.vmap(objective(function), (0, None, None))(queries, key, rest[1]).sum()

    of_queries, of_key = torch.func.grad(summed, (0, 1))(queries, rest[0])
    torch.testing.assert_close(of_queries, torch.stack([grad for grad, _ in expected]))
    torch.testing.assert_close(of_key, torch.stack([grad for _, grad in expected]).sum(0))


@pytest.mark.parametrize("feature", ["attn_mask", "sinks", "alibi_slopes"])
def test_gradients_of_what_a_batch_shares_are_per_sample(feature: str) -> None:
    """Each is a sum over a sample's batch, and no further."""
    generator = torch.Generator().manual_seed(0)
    queries, key = torch.randn(3, 2, 4, 5, 8, generator=generator), torch.randn(2, 4, 7, 8, generator=generator)
    shared = torch.rand((1, 1, 5, 7) if feature == "attn_mask" else (4,), generator=generator)

    def loss(shared: Tensor, query: Tensor) -> Tensor:
        return mfa.attention(query, key, key, **{feature: shared}).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(shared, queries)
    expected = [torch.func.grad(loss)(shared, query) for query in queries]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name: str) -> None:
    function, lengths = FUNCTIONS[name]
    inputs = tensors()
    hessians = (
        torch.func.jacrev(torch.func.grad(objective(f)), (0, 1, 2))(*inputs)
        for f in (function, reference(lengths, oracle.attention))
    )
    for found, expected in zip(*hessians, strict=True):
        torch.testing.assert_close(found, expected)


def of_a_dual(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


@pytest.mark.parametrize("function", [dense, varlen, cached])
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, inputs: torch.func.jvp(lambda q: f(q, *inputs[1:]), inputs[:1], inputs[:1]),
        lambda f, inputs: torch.func.jacfwd(f, 1)(*inputs),
        of_a_dual,
    ],
    ids=["jvp", "jacfwd", "dual numbers"],
)
def test_forward_mode_is_refused(function: Callable[..., Tensor], differentiate: Any) -> None:
    """torch lets an op without a forward derivative lose its tangents: they'd be zero."""
    with pytest.raises(NotImplementedError, match="has no forward-mode derivatives"):
        differentiate(function, tensors())


@pytest.mark.parametrize("function", [dense, varlen])
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, inputs: torch.func.hessian(f)(*inputs),
        lambda f, inputs: torch.func.jvp(lambda q: torch.func.grad(f)(q, *inputs[1:]), inputs[:1], inputs[:1]),
    ],
    ids=["hessian", "jvp of grad"],
)
def test_forward_over_reverse_is_refused(function: Callable[..., Tensor], differentiate: Any) -> None:
    with pytest.raises(NotImplementedError, match="has no forward-mode derivatives"):
        differentiate(objective(function), tensors())


def test_forward_mode_of_something_else() -> None:
    """What has no tangent isn't refused."""
    inputs = tensors()
    _, tangent = torch.func.jvp(lambda x: dense(*inputs).sum() + x.sum(), inputs[:1], inputs[:1])
    torch.testing.assert_close(tangent, inputs[0].sum())
