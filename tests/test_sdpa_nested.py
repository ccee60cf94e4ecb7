"""F.scaled_dot_product_attention of nested tensors through mfa.sdpa: as varlen, or at ATen with a reason."""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from conftest import SIMULATOR
from sdpa_cases import check_nothing_active, random  # noqa: F401 (a fixture)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mfa
from mfa import _log, sdpa
from mfa.sdpa import nested

HEADS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")


@pytest.fixture(name="packed")
def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call that mfa took."""
    calls: list[Any] = []
    original = nested.attention_varlen

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(nested, "attention_varlen", count)
    monkeypatch.setattr(_log, "said", set())
    return calls


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def jagged(values: Tensor, ends: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, ends).transpose(1, 2)


def strided(values: Tensor, ends: Tensor) -> Tensor:
    return torch.nested.as_nested_tensor([values[a:b].transpose(0, 1) for a, b in pairwise(ends.tolist())])


def sequences(out: Tensor) -> list[Tensor]:
    """Of either layout, [L,H,Dv]."""
    return [part.transpose(0, 1) for part in out.unbind()]


def references(values: list[Tensor], ends: Tensor, key_ends: Tensor, function: Any) -> Iterator[Tensor]:
    """One sequence after another."""
    for (a, b), (c, d) in zip(pairwise(ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        parts = (values[0][a:b], values[1][c:d], values[2][c:d])
        yield function(*(part.transpose(0, 1)[None] for part in parts))[0][0].transpose(0, 1)


@pytest.mark.parametrize("kernels", ["cpu", SIMULATOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(
    ("make", "lengths", "key_lengths"),
    [
        (jagged, (8, 5, 1, 3), (8, 5, 1, 3)),
        (jagged, (8, 0, 3), (8, 0, 3)),
        (strided, (8, 5, 1), (2, 9, 4)),
    ],
    ids=["jagged", "jagged, one empty", "strided, keys of other lengths"],
)
def test_runs_as_varlen(
    make: Callable[[Tensor, Tensor], Tensor],
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    dtype: torch.dtype,
    kernels: str,
    packed: list[Any],
) -> None:
    """Forward and backward, against float64."""
    torch.manual_seed(0)
    ends, key_ends = starts(*lengths), starts(*key_lengths)
    total, keys = sum(lengths), sum(key_lengths)
    values = [random(n, HEADS, dim, dtype=dtype, grad=True) for n, dim in ((total, 16), (keys, 16), (keys, 8))]
    weights = random(total, HEADS, 8, dtype=dtype)
    key_side = ends if make is jagged else key_ends  # jagged tensors of one shape share their offsets
    with sdpa.enabled(cpu=True):
        inputs = [make(values[0], ends), make(values[1], key_side), make(values[2], key_side)]
        if kernels == "simulator":
            with mfa.simulate(counters=False) as simulation:
                out = torch.cat(sequences(scaled_dot_product_attention(*inputs, scale=0.3)))
                grads = torch.autograd.grad(out, values, weights)
            assert simulation.launches
        else:
            out = torch.cat(sequences(scaled_dot_product_attention(*inputs, scale=0.3)))
            grads = torch.autograd.grad(out, values, weights)
    assert len(packed) == 1

    def whole(inputs: list[Tensor], function: Any) -> tuple[Tensor, ...]:
        result = torch.cat(list(references(inputs, ends, key_ends, function)))
        return result.detach(), *torch.autograd.grad(result, inputs, weights.to(result.dtype))

    wide = [value.detach().double().requires_grad_() for value in values]
    plain = [value.detach().requires_grad_() for value in values]
    exact = whole(wide, lambda *args: oracle.attention(*args, scale=0.3))
    rounded = whole(plain, lambda *args: oracle.composition(*args, scale=0.3))
    for index, (mine, other, expected) in enumerate(zip((out.detach(), *grads), rounded, exact, strict=True)):
        assert oracle.largest_error(mine, expected) <= oracle.tolerance(other, expected, gradient=index > 0), index


def test_without_gradients(packed: list[Any]) -> None:
    ends = starts(4, 6)
    inputs = [jagged(random(10, HEADS, 16), ends) for _ in range(3)]
    expected = scaled_dot_product_attention(*inputs)
    with sdpa.enabled(cpu=True), torch.no_grad():
        out = scaled_dot_product_attention(*(x.detach() for x in inputs))
    assert len(packed) == 1
    torch.testing.assert_close(out.values(), expected.values())
    assert out.shape == expected.shape
    assert out.values().stride() == expected.values().stride()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, None], ids=["sdpa_kernel", "not asked for"])
def test_left_to_aten(backend: Any, packed: list[Any]) -> None:
    inputs = [jagged(random(10, HEADS, 16), starts(4, 6)) for _ in range(3)]
    expected = scaled_dot_product_attention(*inputs)
    with sdpa.enabled(cpu=backend is not None), sdpa_kernel(backend or list(SDPBackend.__members__.values())[1:4]):
        out = scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(out.values(), expected.values())
    assert not packed


def test_what_mfa_does_not_take_is_logged_once(packed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    wide = [jagged(random(10, HEADS, 600), starts(4, 6)) for _ in range(3)]
    flat = [torch.nested.nested_tensor([random(4, 16), random(6, 16)]) for _ in range(3)]
    with sdpa.enabled(cpu=True), caplog.at_level(logging.WARNING, "mfa"):
        for inputs in (wide, flat) * 2:
            out = scaled_dot_product_attention(*inputs)
            with sdpa_kernel(SDPBackend.MATH):
                expected = scaled_dot_product_attention(*inputs)
            for mine, theirs in zip(out.unbind(), expected.unbind(), strict=True):
                torch.testing.assert_close(mine, theirs)
    reasons = [record.message for record in caplog.records if "sdpa_kernel" not in record.message]
    assert ["head dimension 600" in reasons[0], "nested tensors [B,H,L,D]" in reasons[1]] == [True, True]
    assert len(reasons) == 2


def test_causal_is_refused_as_by_torch(packed: list[Any]) -> None:
    for make in (jagged, strided):
        inputs = [make(random(10, HEADS, 16), starts(4, 6)) for _ in range(3)]
        with pytest.raises(RuntimeError) as expected:
            scaled_dot_product_attention(*inputs, is_causal=True)
        with sdpa.enabled(cpu=True), pytest.raises(RuntimeError) as error:
            scaled_dot_product_attention(*inputs, is_causal=True)
        assert str(error.value).splitlines()[0] == str(expected.value).splitlines()[0]
    assert len(packed) == 0
