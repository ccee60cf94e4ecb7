"""torch.compile and torch.export with sizes that only a run can tell: `x[keep]`, `lengths.max().item()`."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor

import mfa
from mfa.flash_attn import flash_attn_varlen_func

BACKEND = "aot_eager"  # traces as inductor does, and compiles no C++
X = torch.randn(5, 7, 3, 2, 16)  # [B,L,3,H,D]
BATCHES = torch.tensor([True, False, True, True, False])
TOKENS = torch.tensor([True, True, False, True, False, True, True])
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.fixture(autouse=True)
def traced_sizes() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def of_batches(x: Tensor, keep: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in x[keep].unbind(2)]


def of_tokens(x: Tensor, keep: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in x[:, keep].unbind(2)]


def of_keys(x: Tensor, keep: Tensor) -> list[Tensor]:
    query, key, value = (tensor.transpose(1, 2) for tensor in x.unbind(2))
    return [query, key[:, :, keep], value[:, :, keep]]


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones((query.shape[0], 1, 1, key.shape[2]), dtype=torch.bool)
    return mfa.attention(query, key, value, mask)


def biased(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return mfa.attention(query, key, value, query.new_ones((query.shape[2], key.shape[2])).tril())


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": mfa.attention,
    "causal": lambda query, key, value: mfa.attention(query, key, value, is_causal=True),
    "window, lse": lambda query, key, value: mfa.attention(query, key, value, window=(3, 0), return_lse=True)[1],
    "mask": masked,
    "bias": biased,
    "one key head": lambda query, key, value: mfa.attention(query, key[:, :1], value[:, :1]),
}


def traced(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], how: str) -> Tensor:
    if how == "compile":
        return torch.compile(function, fullgraph=True, backend=BACKEND)(*arguments)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return function(*given)

    return torch.export.export(Module(), arguments).module()(*arguments)


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("select", "keep"), [(of_batches, BATCHES), (of_tokens, TOKENS), (of_keys, TOKENS)], ids=["B", "Lq, Lk", "Lk"]
)
def test_attention(select: Callable[..., list[Tensor]], keep: Tensor, call: str, how: str) -> None:
    def function(x: Tensor, keep: Tensor) -> Tensor:
        return CALLS[call](*select(x, keep))

    torch.testing.assert_close(traced(function, (X, keep), how), function(X, keep))


def by_item(packed: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    """flash-attn's idiom."""
    tokens, longest = packed[keep], (starts[1:] - starts[:-1]).max().item()
    return mfa.attention_varlen(tokens, tokens, tokens, starts, starts, longest, longest, is_causal=True)


def by_tensor(packed: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    tokens, longest = packed[keep], (starts[1:] - starts[:-1]).max()
    return mfa.attention_varlen(tokens, tokens, tokens, starts, starts, longest, longest, is_causal=True)


def by_flash_attn(packed: Tensor, keep: Tensor, starts: Tensor) -> Tensor:
    tokens, longest = packed[keep], (starts[1:] - starts[:-1]).max()
    return flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, longest, longest, causal=True)


@pytest.mark.parametrize("how", ["eager", "compile", "export"])
@pytest.mark.parametrize("function", [by_item, by_tensor, by_flash_attn])
def test_varlen(function: Callable[..., Tensor], how: str) -> None:
    packed = X[0, :, 0]
    expected = mfa.attention_varlen(*(packed[TOKENS],) * 3, STARTS, STARTS, 3, 3, is_causal=True)
    arguments = packed, TOKENS, STARTS
    out = function(*arguments) if how == "eager" else traced(function, arguments, how)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("function", [by_item, by_tensor])
def test_varlen_trains(function: Callable[..., Tensor]) -> None:
    packed = X[0, :, 0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(traced(function, (packed, TOKENS, STARTS), "compile").square().sum(), packed)
    (expected,) = torch.autograd.grad(function(packed, TOKENS, STARTS).square().sum(), packed)
    torch.testing.assert_close(grad, expected)


def test_a_run_asserts_what_tracing_took_for_granted() -> None:
    """Two selections of as many elements as nobody knows when the code is traced."""

    def function(x: Tensor, keep: Tensor, other: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in x.unbind(2))
        return mfa.attention(query, key[:, :, keep], value[:, :, other])

    compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(X, TOKENS, TOKENS.flip(0)), function(X, TOKENS, TOKENS.flip(0)))
    with pytest.raises(RuntimeError):
        compiled(X, TOKENS, ~TOKENS)
