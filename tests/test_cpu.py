"""The implementation for CPU tensors: gradients, cuts into blocks, memory."""

import subprocess
import sys
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from strategies import DTYPES, Problem, problems
from test_attention import check
from test_backward import check as check_gradients
from torch import Tensor

import mfa
from mfa._cpu import backward, blocks, forward

ALL_DTYPES = (*DTYPES, torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = (normal(2, 4, 5, 3), normal(2, 2, 6, 3), normal(2, 2, 6, 2), normal(1, 4, 1, 6), normal(4))

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        terms = {"attn_mask": mask, "sinks": sinks, "softcap": 2.0, "window": (3, 1), "enable_gqa": True}
        return mfa.attention(query, key, value, **terms)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("scratch", [1, 1 << 12, 1 << 16])
def test_any_cut_gives_the_same(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of heads and blocks of rows down to one row at a time."""
    monkeypatch.setattr(blocks, "SCRATCH_BYTES", scratch)

    @seed(scratch)
    @settings(max_examples=40)
    @given(problems(dtypes=ALL_DTYPES))
    def holds(problem: Problem) -> None:
        check(problem, Device("cpu"))
        check_gradients(problem, Device("cpu"))

    holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_takes_few_calls(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has all threads start and wait for each other, which takes long where other processes have the cores."""
    calls: list[str] = []
    for module in (forward, backward):
        original = module._fused

        def counting(*args: Any, _name: str = module.__name__, _original: Any = original, **options: Any) -> Any:
            calls.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(module, "_fused", counting)
    query, key, value = (normal(1, 8, 8192, 64).to(dtype).requires_grad_() for _ in range(3))
    out = mfa.attention(query, key, value, window=(255, 0))
    torch.autograd.grad(out.sum(), (query, key, value))
    edges, bands = 4, 2  # of 128 blocks per chunk of heads
    assert calls.count(forward.__name__) <= 8 * (edges + bands)
    assert calls.count(backward.__name__) <= 8 * (edges + bands)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 6))
def test_a_band_adds_every_block(rows: int, keys: int, count: int, batch: int) -> None:
    band = blocks.Band(slice(2, 2 + rows), slice(3, 3 + keys), count)
    batch = batch if count == 1 else 1
    assert band.apart * rows >= keys or count == 1  # those that are added at once share no key
    target = normal(batch, 2, 3 + keys + rows * count, 4)
    summand = normal(count if count > 1 else batch, 2, keys, 4)
    expected = target.clone()
    for block in range(count):
        span = slice(3 + block * rows, 3 + block * rows + keys)
        expected[:, :, span] += summand[block : block + 1] if count > 1 else summand
    assert torch.equal(band.of_keys(expected)[-1], expected[-1:, :, 3 + rows * (count - 1) :][:, :, :keys][0])
    band.add_to_keys(target, summand)
    torch.testing.assert_close(target, expected)


bounds = st.none() | st.integers(-60, 60)


@given(st.integers(0, 40), st.integers(0, 40), bounds, bounds, st.integers(1, 16))
def test_window(query_length: int, key_length: int, left: int | None, right: int | None, step: int) -> None:
    window = blocks.Window.of(query_length, key_length, left, right)
    seen = oracle.visible(query_length, key_length, (left, right))
    rows = window.rows()
    assert [bool(row.any()) for row in seen] == [rows.start <= i < rows.stop for i in range(query_length)]
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        keys = window.keys(block)
        visited = torch.zeros(key_length, dtype=torch.bool)
        visited[keys] = True
        assert torch.equal(visited, seen[block].any(0))
        assert window.hides(block, keys) == (not seen[block, keys].all())


@pytest.mark.parametrize("terms", [{}, {"is_causal": True}, {"window": (3, 2)}, {"attn_mask": torch.ones(9, 9) > 0}])
def test_scores_that_overflow_only_before_the_scale(terms: dict[str, Any]) -> None:
    query, key, value = (
        torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)
    )
    expected = mfa.attention(query, key, value, scale=2.0, **terms, return_lse=True)
    results = mfa.attention(query * 1e19, key * 1e19, value, scale=2e-38, **terms, return_lse=True)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)
    grads, references = (torch.autograd.grad(x[0].sum(), (query, key, value)) for x in (results, expected))
    torch.testing.assert_close(grads, references, rtol=1e-4, atol=1e-4)


def aten_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Not so where ATEN_CPU_CAPABILITY keeps instructions from ATen that oneDNN counts on."""
    try:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 1, 700, 64), (3, 64, 64, 64), (2, 130, 5, 40)], ids=str)
@pytest.mark.parametrize("terms", [{}, {"is_causal": True}, {"scale": 0.0}, {"scale": 2.0}], ids=str)
def test_half_types_without_lse(dtype: torch.dtype, shape: tuple[int, int, int, int], terms: dict[str, Any]) -> None:
    """ATen's own kernel for half types, within the numerics rule, where the result has many numbers."""
    batch, (heads, length_q, length_k, dim) = 8, shape
    query, key, value = (normal(batch, heads, n, dim).to(dtype) for n in (length_q, length_k, length_k))
    out = mfa.attention(query, key, value, **terms)
    expected = oracle.attention(query, key, value, **terms)[0]
    plain = oracle.composition(query, key, value, **terms)[0]
    assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)
    exact = mfa.attention(query, key, value, **terms, return_lse=True)[0]
    if not terms and aten_takes(query, key, value):
        assert not torch.equal(out, exact)  # the other way to compute it is another one


@pytest.mark.parametrize("softcap", [5.0, 50.0])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (256, 256), (576, 512)])
def test_one_query_of_many_heads(head_dim: int, value_dim: int, softcap: float) -> None:
    """The rule compares with a product per head, whose sums are more exact than those of one product for a group."""
    for heads in (5, 16, 17, 32):
        for keys in (3, 16, 33, 100):
            query, key = 2 * normal(1, heads, 1, head_dim), normal(1, 1, keys, head_dim)
            value = normal(1, 1, keys, value_dim)
            expected = oracle.attention(query, key, value, softcap=softcap)[0]
            plain = oracle.composition(query, key, value, softcap=softcap)[0]
            out = mfa.attention(query, key, value, softcap=softcap, enable_gqa=True)
            assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)


def test_float64_is_float64() -> None:
    query, key, value = (torch.randn(1, 2, 70, 16, dtype=torch.float64) for _ in range(3))
    for terms in ({}, {"window": (9, 3)}, {"softcap": 4.0}, {"alibi_slopes": torch.tensor([0.5, 0.25])}):
        expected = oracle.attention(query, key, value, **terms)[0]
        assert oracle.largest_error(mfa.attention(query, key, value, **terms), expected) < 1e-14


MEMORY = """
import re, sys, torch, mfa
from pathlib import Path

def memory(field):  # not getrusage: its peak may be that of the parent, before exec
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
shape, dtype = (1, 8, 8192, 64), getattr(torch, sys.argv[1])
query, key, value = (torch.empty(shape, dtype=dtype).normal_() for _ in range(3))
terms = {
    "dense": {},
    "causal": {"is_causal": True},
    "window": {"window": (256, 0)},
    "bottom-right": {"window": (1000, -3)},
    "alibi": {"alibi_slopes": torch.full((8,), 0.1), "window": (512, 0)},
    "softcap": {"softcap": 20.0, "window": (512, 0)},
    "dropout": {"dropout_p": 0.1, "window": (128, 0)},
    "padding": {"attn_mask": torch.ones(1, 1, 1, 8192, dtype=torch.bool), "window": (512, 0)},
}[sys.argv[2]]
training = len(sys.argv) > 3

def run(tensors, terms):
    leaves = [tensor.detach().requires_grad_(training) for tensor in tensors]
    out, lse = mfa.attention(*leaves, **terms, return_lse=True)
    if training:
        out.sum().backward()
    return out, lse

run([x[:, :, :300] for x in (query, key, value)], {**terms, "attn_mask": None})  # loads code
before = memory("VmRSS")
out, lse = run((query, key, value), terms)
# With gradients: out's and its correction, and three.
print(memory("VmHWM") - before, (9 if training else 4) * query.nbytes + lse.nbytes, 3 * query.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        "float32 causal",
        "float32 dropout",
        "bfloat16 window training",
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                "float32 window",
                "float32 bottom-right",
                "float32 alibi",
                "float32 softcap",
                "float32 padding",
                "bfloat16 window",
                "float32 window training",
                "float32 softcap training",
            )
        ),
    ],
)
def test_memory_grows_with_the_lengths_only(arguments: str) -> None:
    """8192 x 8192 scores of 8 heads would be 2 GiB; allowed are 1.2 times inputs and outputs, and 64 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments.split()], check=True, capture_output=True, text=True, timeout=600
    )
    grown, tensors, inputs = map(int, result.stdout.split())
    assert inputs + grown <= 1.2 * tensors + (64 << 20)
