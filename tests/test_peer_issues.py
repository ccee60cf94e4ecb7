"""What users of other attentions on Macs ran into, each test named after the report."""

from typing import Any

import pytest
import torch
from conftest import Device
from oracle import attention, composition, largest_error, tolerance
from sdpa_cases import check_nothing_active, count_routed, qkv, random, skip_unless_taken  # noqa: F401 (fixtures)
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import mfa
from mfa import sdpa


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


@pytest.mark.simulator
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
