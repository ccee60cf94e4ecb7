"""mfa.merge_attention, and what is made with it: attention in chunks, and over processes."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from serving import normal, starts
from torch import Tensor

import mfa

INF = math.inf


def halves(split: int = 20) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[Tensor]]:
    query, key, value = normal(2, 4, 9, 16), normal(2, 2, 33, 16, seed=1), normal(2, 2, 33, 8, seed=2)
    parts = (slice(None, split), slice(split, None))
    a, b = (oracle.attention(query, key[:, :, rows], value[:, :, rows]) for rows in parts)
    return a, b, [query, key, value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [0, 1, 20, 33])
def test_merging_gives_the_whole(device: Device, dtype: torch.dtype, split: int) -> None:
    _, _, inputs = halves()
    inputs = [x.to(dtype) for x in inputs]
    query, key, value = (x.to(device.type) for x in inputs)
    parts = [(slice(None, split), None), (slice(split, None), normal(4, seed=3).to(device.type))]
    with torch.no_grad(), device.active():
        results = []
        for rows, sinks in parts:
            terms = {} if device.has_kernels else {"sinks": sinks}
            results.append(
                mfa.attention(query, key[:, :, rows], value[:, :, rows], enable_gqa=True, return_lse=True, **terms)
            )
    out, lse = mfa.merge_attention(*results[0], *results[1])
    terms = {} if device.has_kernels else {"sinks": normal(4, seed=3)}
    expected, plain = (f(*inputs, **terms) for f in (oracle.attention, oracle.composition))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    for actual, reference, torchs in zip((out, lse), expected, plain, strict=True):
        rounding = 2 * torch.finfo(dtype).eps * float(reference.abs().max())  # a part is rounded before it is merged
        assert oracle.largest_error(actual.cpu(), reference) <= oracle.tolerance(torchs, reference) + rounding


def test_gradients_are_those_of_the_whole() -> None:
    query, key, value = (x.double().requires_grad_() for x in halves()[2])
    parts = [
        mfa.attention(query, key[:, :, rows], value[:, :, rows], enable_gqa=True, return_lse=True, window=window)
        for rows, window in ((slice(None, 20), (None, 4)), (slice(20, None), (None, 0)))
    ]
    merged = mfa.merge_attention(*parts[0], *parts[1])
    # The same as windows of the whole: 4 - (20 - 9) and 0 - (13 - 9) + 20, from i.
    i, j = torch.arange(9)[:, None], torch.arange(33)[None]
    mask = torch.where(j < 20, j <= i + 11 + 4, j - 20 <= i + 4)[None, None]
    whole = oracle.attention(query, key, value, bias=mask)
    inputs = (query, key, value)
    grads = [torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs) for out, lse in (merged, whole)]
    # lse is float32.
    torch.testing.assert_close(merged[0], whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-5)


def test_gradcheck() -> None:
    shapes = ((2, 3, 4, 5), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4))
    inputs = [normal(*shape, seed=i).double() for i, shape in enumerate(shapes)]
    inputs[1][0, 0, :2] = -INF
    inputs[3][0, 0, 1:3] = -INF
    inputs = [x.requires_grad_() for x in inputs]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = mfa.merge_attention(*tensors)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(function, inputs)
    finite = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in finite:
            x.nan_to_num_(neginf=-2.0)
    assert torch.autograd.gradgradcheck(function, finite)


def test_a_part_that_saw_nothing_counts_for_nothing() -> None:
    (out_a, lse_a), (out_b, lse_b), _ = halves()
    tensors = [x.float().requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    with torch.no_grad():
        tensors[1][0] = -INF
        tensors[0][0] = math.nan
        tensors[3][0, 0] = -INF
    out, lse = mfa.merge_attention(*tensors)
    assert (out[0, 0] == 0).all()
    assert (lse[0, 0] == -INF).all()
    assert torch.equal(out[0, 1:], tensors[2][0, 1:])
    assert torch.equal(lse[0, 1:], tensors[3][0, 1:])
    grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[0, 0] == 0).all() for grad in grads)
    assert (grads[0][0] == 0).all()
    assert (grads[1][0] == 0).all()
    assert (grads[2][0, 1:] == 1).all()


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_any_finite_lse_is_safe(size: float) -> None:
    out_a, out_b = normal(1, 1, 4, 2), normal(1, 1, 4, 2, seed=1)
    lse_a, lse_b = (torch.tensor(values).view(1, 1, 4) * size for values in ([1.0, -1, 1, -1], [1.0, -1, -1, 1]))
    out, lse = mfa.merge_attention(out_a, lse_a, out_b, lse_b)
    half = (out_a + out_b) / 2
    expected = torch.stack([half[0, 0, 0], half[0, 0, 1], out_a[0, 0, 2], out_b[0, 0, 3]])
    torch.testing.assert_close(out[0, 0], expected)
    torch.testing.assert_close(lse, torch.maximum(lse_a, lse_b) + torch.tensor([math.log(2), math.log(2), 0, 0]))


def test_nan_stays_in_its_row() -> None:
    (out_a, lse_a), (out_b, lse_b), _ = halves()
    lse_a[0, 1, 3] = out_a[0, 1, 3, 0] = math.nan
    out, lse = mfa.merge_attention(out_a.float(), lse_a.float(), out_b.float(), lse_b.float())
    rows = torch.zeros(lse.shape, dtype=torch.bool)
    rows[0, 1, 3] = True
    assert out[rows].isnan().all()
    assert torch.equal(lse.isnan(), rows)
    assert out[~rows].isfinite().all()


def test_packed_sequences() -> None:
    query, key, value = normal(9, 4, 16), normal(15, 2, 16, seed=1), normal(15, 2, 8, seed=2)
    whole = mfa.attention_varlen(query, key, value, starts([5, 4]), starts([6, 9]), 5, 9, return_lse=True)
    first, second = [*range(4), *range(6, 12)], [4, 5, 12, 13, 14]
    a, b = (
        mfa.attention_varlen(query, key[rows], value[rows], starts([5, 4]), starts(lengths), 5, 9, return_lse=True)
        for rows, lengths in ((first, [4, 6]), (second, [2, 3]))
    )
    for packed in (None, True):
        torch.testing.assert_close(mfa.merge_attention(*a, *b, packed=packed), whole)


def test_three_dimensions_that_could_be_either() -> None:
    out, lse = normal(4, 4, 8), normal(4, 4)
    with pytest.raises(ValueError, match=r"out_a has shape \[4, 4, 8\], either .*; packed must be False or True"):
        mfa.merge_attention(out, lse, out, lse)
    dense = mfa.merge_attention(out, lse, out, lse * 0, packed=False)
    packed = mfa.merge_attention(out.transpose(0, 1), lse, out.transpose(0, 1), lse * 0, packed=True)
    torch.testing.assert_close(packed[0].transpose(0, 1), dense[0])
    assert torch.equal(packed[1], dense[1])
    rank_3 = mfa.attention(normal(4, 9, 8), normal(4, 9, 8), normal(4, 9, 8), return_lse=True)
    torch.testing.assert_close(mfa.merge_attention(*rank_3, rank_3[0], rank_3[1] - INF), rank_3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"out_b": normal(2, 3, 4, 6)}, ValueError, "out_b has shape"),
        ({"lse_a": normal(2, 4, 3)}, ValueError, r"lse_a has shape \[2, 4, 3\]; it must have shape \[2, 3, 4\]"),
        ({"lse_b": normal(2, 3, 5)}, ValueError, "lse_b has shape"),
        ({"out_a": normal(4, 5), "out_b": normal(4, 5)}, ValueError, "out_a has 2 dimensions"),
        ({"lse_a": normal(2, 3, 4).half()}, TypeError, "lse_a has dtype float16"),
        ({"out_b": normal(2, 3, 4, 5).half()}, TypeError, "out_b has dtype float16; it must be float32"),
        ({"lse_b": 1.0}, TypeError, "lse_b is of type float"),
        ({"packed": True}, ValueError, "packed is True; out_a must have 3 dimensions"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    names = ("out_a", "lse_a", "out_b", "lse_b")
    shapes = ((2, 3, 4, 5), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4))
    values = {name: normal(*shape) for name, shape in zip(names, shapes, strict=True)}
    mfa.merge_attention(**values)
    with pytest.raises(error, match=words):
        mfa.merge_attention(**{**values, **change})


def test_prefill_in_chunks() -> None:
    """Each chunk of queries: what came before, merged with its own causal block; gradients too."""
    inputs = [x.requires_grad_() for x in (normal(1, 4, 50, 16), normal(1, 2, 50, 16), normal(1, 2, 50, 16, seed=2))]
    query, key, value = inputs
    outs = []
    for first in range(0, 50, 20):
        rows, before = slice(first, min(first + 20, 50)), slice(0, first)
        own = mfa.attention(*(x[:, :, rows] for x in inputs), is_causal=True, enable_gqa=True, return_lse=True)
        past = mfa.attention(
            query[:, :, rows], key[:, :, before], value[:, :, before], enable_gqa=True, return_lse=True
        )
        outs.append(mfa.merge_attention(*past, *own)[0])
    out = torch.cat(outs, dim=2)
    references = [f(*inputs, is_causal=True)[0] for f in (oracle.attention, oracle.composition)]
    assert oracle.largest_error(out, references[0]) <= oracle.tolerance(references[1], references[0])
    ours, expected, plain = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, *references))
    for actual, reference, torchs in zip(ours, expected, plain, strict=True):
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(torchs, reference, gradient=True)


# -- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_of_processes(size: int, tmp_path: Path) -> None:
    """Every case of ring_cases.py: attention over a sequence in parts, forward and backward, equals the whole."""
    script = Path(__file__).parent / "ring_cases.py"
    arguments = [str(size), str(tmp_path / "store"), str(tmp_path / "report")]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), *arguments], env=environment) for rank in range(size)
    ]
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    reports = [tmp_path / f"report.{rank}" for rank in range(size)]
    assert [report.read_text() if report.exists() else "died" for report in reports] == [""] * size


def test_a_ring_needs_processes() -> None:
    query, key, value = normal(1, 2, 4, 8), normal(1, 2, 4, 8), normal(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised"):
        mfa.context_parallel(query, key, value)
    with pytest.raises(TypeError, match="is_causal is 1"):
        mfa.context_parallel(query, key, value, is_causal=1)  # type: ignore[call-overload]
