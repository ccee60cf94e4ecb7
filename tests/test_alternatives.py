"""Kernels that tuning.def doesn't choose, for the benchmark to choose among: as right as the others."""

from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from plan_problems import CATALOGUE, FAMILIES, METAL
from torch import Tensor

import mfa
from mfa import _library, _native
from mfa.bench import autotune

pytestmark = pytest.mark.simulator
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def alternatives() -> Iterator[_native.Instance]:
    """By the rows that tuning.def has."""
    tuned = (METAL.parent / "csrc" / "plan" / "tuning.def").read_text()
    for row in CATALOGUE.values():
        is_tuned = row.kind in autotune.TUNABLE and any(autotune.row_of(row, family) in tuned for family in FAMILIES)
        if row.kind in autotune.TUNABLE and not is_tuned and row.path != "team":  # a bucket of teams has but one
            yield row


@pytest.fixture(params=list(alternatives()), ids=lambda row: row.name)
def preferred(request: pytest.FixtureRequest) -> Iterator[_native.Instance]:
    _library.prefer_instance(request.param.name)
    before = _library.set_backward_mode(7 if request.param.kind == "backward_dq" else 0)
    yield request.param
    _library.set_backward_mode(before)
    _library.prefer_instance(None)


@pytest.mark.parametrize("is_causal", [False, True], ids=["dense", "causal"])
def test_out_and_gradients_are_right(preferred: _native.Instance, is_causal: bool) -> None:
    dtype, generator = DTYPES[preferred.dtype], torch.Generator().manual_seed(0)
    shapes = [(2, 4, 77, preferred.head_dim), (2, 2, 100, preferred.head_dim), (2, 2, 100, preferred.value_dim)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grad = torch.randn(2, 4, 77, preferred.value_dim, generator=generator).to(dtype)

    def results(attention: Callable[..., Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    family = "apple10" if preferred.path.startswith("unit") else "apple9"
    with mfa.simulate(family, checks=("races", "bounds"), seed=3) as sim:
        found = results(lambda q, k, v: mfa.attention(q, k, v, is_causal=is_causal, enable_gqa=True))
    assert preferred.name in {launch.kernel for launch in sim.launches}
    exact = results(lambda q, k, v: oracle.attention(q, k, v, is_causal=is_causal)[0], torch.float64)
    plain = results(lambda q, k, v: oracle.composition(q, k, v, is_causal=is_causal)[0])
    for i, (actual, expected, reference) in enumerate(zip(found, exact, plain, strict=True)):
        assert oracle.largest_error(actual, expected) <= oracle.tolerance(reference, expected, gradient=i > 0)


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="name is 'forward_f16_d48'; it must be that of a kernel instance"):
        _library.prefer_instance("forward_f16_d48")
