"""Gradients of mfa.attention against float64, on every device: the numerics rule, all inputs, both backward modes."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from gradient_rule import Change, differentiate, shares, unchanged
from hypothesis import given, seed, settings
from strategies import DTYPES, TIMES, Problem, problems, shards
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mfa
from mfa import _library

GEMMS = {"five": 5, "seven": 7}


@contextmanager
def forced(mode: str) -> Iterator[None]:
    """Inside it, the kernels' backward pass has so many GEMMs."""
    before = _library.set_backward_mode(GEMMS[mode])
    try:
        yield
    finally:
        _library.set_backward_mode(before)


@pytest.fixture(params=GEMMS)
def mode(request: pytest.FixtureRequest, device: Device) -> Iterator[str]:
    """Forces one of the two backward algorithms; the CPU has but one."""
    if not device.has_kernels and request.param == "five":
        pytest.skip("the CPU implementation has no modes")
    with forced(request.param):
        yield request.param


def check(problem: Problem, device: Device) -> float:
    """Every gradient obeys the numerics rule, and is reproducible. Returns the largest error over what is allowed.

    Half of the problems have a gradient of lse, and half ask for those of more than query, key and value.
    """
    (query, key, value), terms = problem.arguments()
    tensors = {"query": query, "key": key, "value": value}
    for name in ("attn_mask", "sinks", "alibi_slopes"):
        tensor = terms.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    terms.pop("enable_gqa")
    generator = torch.Generator().manual_seed(problem.seed + 1)
    shape = (problem.batch, problem.query_heads, problem.query_length)
    grads = (
        torch.randn(*shape, problem.value_dim, generator=generator).to(problem.dtype),
        torch.randn(shape, generator=generator) if problem.seed & 1 else None,
    )
    asked = [*tensors] if problem.seed & 2 else ["query", "key", "value"]
    wanted = [name for name in asked if tensors[name].dtype != torch.bool]

    def reference(dtype: torch.dtype, change: Change = unchanged) -> dict[str, Tensor]:
        """Whole matrices in `dtype`; torch's math SDPA computes half types in float32 like this, and rounds once."""

        def call(query: Tensor, key: Tensor, value: Tensor, order: Any = None, **rest: Tensor) -> tuple[Tensor, Tensor]:
            mask = rest.get("attn_mask")
            bias = None if mask is None else mask[(None,) * (4 - mask.dim())]
            slopes = rest.get("alibi_slopes")
            scores, seen = oracle.logits(query, key, bias=bias, alibi_slopes=slopes, order=order, **terms)
            probability, lse = oracle.weights(scores, seen, rest.get("sinks"))
            repeated = value.repeat_interleave(problem.group, dim=1)
            return torch.einsum("bhij,bhjd->bhid", probability.to(value.dtype), repeated), lse

        leaves = {
            name: tensor.detach().clone()
            if tensor.dtype == torch.bool
            else tensor.detach().to(dtype).clone().requires_grad_(name in wanted)
            for name, tensor in tensors.items()
        }
        return differentiate(change(call), leaves, grads)

    def plain(change: Change) -> dict[str, Tensor]:
        found = reference(torch.promote_types(problem.dtype, torch.float32), change)
        return {name: grad.to(tensors[name].dtype) for name, grad in found.items()}

    expected = reference(torch.float64)

    def ours(order: int) -> dict[str, Tensor]:
        moved = {
            name: leaf.requires_grad_(name in wanted)
            for name, leaf in ((name, tensor.detach().to(device.type)) for name, tensor in tensors.items())
        }
        moved_grads = (grads[0].to(device.type), None if grads[1] is None else grads[1].to(device.type))
        with device.active(seed=order):
            found = differentiate(
                lambda **leaves: mfa.attention(**leaves, **terms, enable_gqa=problem.group > 1, return_lse=True),
                moved,
                moved_grads,
            )
        return {name: grad.cpu() for name, grad in found.items()}

    results = [ours(order) for order in ((0, 1, 2) if device.name == "simulator" else (0,))]
    for name, grad in results[0].items():
        assert grad.shape == tensors[name].shape
        assert grad.dtype == tensors[name].dtype
        for other in results[1:]:
            torch.testing.assert_close(other[name], grad, rtol=0, atol=0, equal_nan=True)
    found = shares(results[0], expected, plain, problem.dtype if device.has_kernels else None)
    for name, share in found.items():
        assert share <= 1, name
    return max(found.values())


@pytest.mark.parametrize("shard", shards(10, 5))
def test_random_problems(device: Device, shard: int) -> None:
    """520 problems, half of them in each mode. With ARGS=-rP, says how near they come to what is allowed."""
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)
    ratios = []

    @seed(shard)
    @settings(max_examples=52 * TIMES)
    @given(problems(dtypes=dtypes))
    def holds(problem: Problem) -> None:
        ratios.append(check(problem, device))

    with forced([*GEMMS][shard % 2]):
        holds()
    print(f"largest error of {len(ratios)} problems: {max(ratios):.2f} of what is allowed")  # noqa: T201


@pytest.mark.parametrize("scale", [1.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_out_does_not_reach_gradients(device: Device, mode: str, dtype: torch.dtype, scale: float) -> None:
    """At this scale a few keys dominate each row: delta, from an out of 16 bits, would break the rule by up to 2.2.

    So would, by up to 4, scores that backward multiplies by the scale in another way than forward did: 0.9 rounds.
    """
    generator = torch.Generator().manual_seed(0)
    *tensors, grad = (torch.randn(1, 4, 64, 64, generator=generator).to(dtype) for _ in range(4))

    def gradients(function: Any, device_type: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device_type, dtype).requires_grad_() for tensor in tensors]
        out = function(*leaves, is_causal=True, scale=scale)
        return [found.cpu() for found in torch.autograd.grad(out, leaves, grad.to(device_type, dtype))]

    with sdpa_kernel(SDPBackend.MATH):
        expected, plain = (gradients(scaled_dot_product_attention, "cpu", x) for x in (torch.float64, dtype))
    with device.active():
        ours = gradients(mfa.attention, device.type, dtype)
    for actual, reference, torchs in zip(ours, expected, plain, strict=True):
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(torchs, reference, gradient=True)


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def count(length: int, mode: str, **kwargs: Any) -> tuple[mfa.Counters, mfa.Counters]:
    """Counters of forward and backward; float16, one head, D 64."""
    query, key, value = (normal(1, 1, length, 64).requires_grad_() for _ in range(3))
    with forced(mode), mfa.simulate() as sim:
        out = mfa.attention(query, key, value, **kwargs)
        forward = sim.counters
        out.backward(normal(*out.shape))
    backward = sum((launch.counters for launch in sim.launches[1:]), mfa.Counters())
    return forward, backward


@pytest.mark.simulator
@pytest.mark.parametrize(("mode", "most"), [("seven", 7 / 2), ("five", 5 / 2)])
# One row tile of dK and dV reads Q and dO for half as many products; two don't fit in registers (docs/registers.md).
@pytest.mark.parametrize(("tile", "reads", "loads"), [("r1_q32", 2.0, 8.6), ("r2_q16", 1.2, 6.2)])
def test_operation_budgets(mode: str, most: float, tile: str, reads: float, loads: float) -> None:
    _library.prefer_instance(f"backward_dkdv_f16_d64_v64_s4_{tile}")
    try:
        forward, backward = count(256, mode)
    finally:
        _library.prefer_instance(None)
    assert backward.mma <= most * forward.mma
    assert backward.simdgroup_barriers == backward.shuffles - 192 == 0  # 192 in backward_delta
    per_mma = forward.threadgroup_read_bytes / forward.mma
    assert backward.threadgroup_read_bytes / backward.mma <= reads * per_mma
    assert backward.fragment_loads / backward.mma <= loads  # of a lane, 32 of which are a load


@pytest.mark.simulator
@pytest.mark.parametrize("mode", GEMMS)
def test_causal_skips_what_no_row_sees(mode: str) -> None:
    dense, causal = (count(1024, mode, is_causal=is_causal)[1] for is_causal in (False, True))
    assert causal.mma <= 0.56 * dense.mma


@pytest.mark.simulator
@pytest.mark.parametrize("names", [("query",), ("key",), ("value",), ("query", "value"), ("key", "value")])
def test_only_what_is_asked_for_is_computed(names: tuple[str, ...]) -> None:
    tensors = {name: normal(1, 2, 40, 32) for name in ("query", "key", "value")}
    for name in names:
        tensors[name].requires_grad_()
    with mfa.simulate() as sim:
        mfa.attention(**tensors).sum().backward()
    kernels = [launch.kernel for launch in sim.launches]
    assert any("dkdv" in kernel for kernel in kernels) == ("key" in names or "value" in names)
    assert any("dq" in kernel for kernel in kernels) == ("query" in names)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_gradients_of_the_output_in_any_layout(device: Device, layout: str) -> None:
    query, key, value = (normal(2, 3, 33, 40).to(device.type).requires_grad_() for _ in range(3))
    grad = {
        "expanded": torch.ones(1, device=device.type, dtype=torch.float16).expand(2, 3, 33, 40),
        "transposed": normal(2, 33, 3, 40).to(device.type).transpose(1, 2),
        "sliced": normal(2, 3, 33, 80).to(device.type)[..., ::2],
    }[layout]
    with device.active():
        out = mfa.attention(query, key, value)
        strided = torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)
        dense = torch.autograd.grad(out, (query, key, value), grad.contiguous())
    torch.testing.assert_close(strided, dense, rtol=0, atol=0)


@pytest.mark.parametrize(("window", "key_length"), [((0, 0), 40), ((None, None), 1)])
def test_rows_that_see_one_key(window: tuple[int | None, int | None], key_length: int) -> None:
    """Nothing is left to choose: gradients of query and key are 0, exactly so on the CPU."""
    query = torch.randn(1, 2, 40, 1, requires_grad=True)
    key, value = (torch.randn(1, 2, key_length, dim, requires_grad=True) for dim in (1, 96))
    out = mfa.attention(query, key, value, window=window)
    grads = torch.autograd.grad(out, (query, key, value), torch.randn_like(out))
    assert not grads[0].any()
    assert not grads[1].any()
    assert grads[2].any()


def test_rows_that_see_nothing_have_no_gradient(device: Device) -> None:
    query, key, value = (normal(1, 2, length, 32).to(device.type).requires_grad_() for length in (20, 9, 9))
    with device.active():
        mfa.attention(query, key, value, window=(None, 0)).sum().backward()  # rows 0 .. 10 see nothing
    assert query.grad is not None
    assert not query.grad[:, :, :11].any()
    assert query.grad.isfinite().all()


@pytest.mark.simulator
def test_scratch_is_bounded() -> None:
    """Five GEMMs run in chunks of heads whose dS fits the limit, else the seven-GEMM mode does."""
    limit = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_library.address_of("mfa_set_scratch_limit"))
    query, key, value = (normal(1, 4, 64, 32).requires_grad_() for _ in range(3))
    found = {}
    for heads in (4, 2, 0):
        before = limit(heads * 64 * 64 * 4)
        with forced("five"), mfa.simulate() as sim:
            out = mfa.attention(query, key, value)
            found[heads] = torch.autograd.grad(out.sum(), (query, key, value))
        limit(before)
        chunks = [launch.kernel for launch in sim.launches if "dq_from_ds" in launch.kernel]
        assert len(chunks) == {4: 1, 2: 2, 0: 0}[heads]
    torch.testing.assert_close(found[4], found[2], rtol=0, atol=0)
