"""mfa.flash_attn.rotary: rotation as multiplication of complex numbers in float64."""

import oracle
import pytest
import torch
from rotation import rotated
from torch import Tensor

from mfa.flash_attn import rotary

POSITIONS = 32


def tables(dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(POSITIONS, dim // 2, dtype=torch.float64) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rounding(expected: Tensor, dtype: torch.dtype) -> float:
    """One of the result, and three of float32 before it."""
    largest = float(expected.detach().abs().max())
    return largest * (torch.finfo(dtype).eps / 2 * (1 + 1e-3) + 3 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [16, 10, 2])
@pytest.mark.parametrize("offsets", ["none", "one", "each", "packed"])
def test_rotary_against_float64(offsets: str, dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cos, sin = tables(dim, dtype)
    x = torch.randn(2, 5, 3, 16).to(dtype)
    tokens = torch.arange(5)
    arguments: dict[str, object] = {}
    if offsets == "none":
        rows = tokens.expand(2, 5)
    elif offsets == "one":
        rows, arguments = (tokens + 7).expand(2, 5), {"seqlen_offsets": 7}
    else:
        starts = torch.tensor([3, 27], dtype=torch.int32)
        rows, arguments = tokens + starts[:, None], {"seqlen_offsets": starts}
    if offsets == "packed":
        x, rows = x.flatten(0, 1)[:7], torch.tensor([3, 4, 5, 6, 7, 30, 31])
        arguments = {"seqlen_offsets": torch.tensor([3, 30]), "cu_seqlens": torch.tensor([0, 5, 7])}
    x.requires_grad_()
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, **arguments)  # type: ignore[arg-type]
    expected = rotated(x, cos, sin, rows, interleaved)
    assert out.dtype == dtype
    assert oracle.largest_error(out, expected) <= rounding(expected, dtype)
    grad = torch.randn(x.shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, grad)
    expected = rotated(grad, cos, sin, rows, interleaved, conjugate=True)
    assert oracle.largest_error(gradient, expected) <= rounding(expected, dtype)

    detached = x.detach()
    back = rotary.apply_rotary(out.detach(), cos, sin, interleaved=interleaved, conjugate=True, **arguments)  # type: ignore[arg-type]
    if dtype == torch.float32:
        torch.testing.assert_close(back, detached)
    with torch.no_grad():
        copy = detached.clone()
        assert rotary.apply_rotary_emb(copy, cos, sin, interleaved, True, **arguments) is copy  # type: ignore[arg-type]
    assert torch.equal(copy, out)


@pytest.mark.parametrize("layout", ["packed", "heads", "two tables"])
def test_qkv_in_place(layout: str) -> None:
    torch.manual_seed(0)
    (cos, sin), other = tables(16), tables(16)
    rows = torch.arange(5).expand(2, 5) + 4
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16)
    if layout == "packed":
        q = q[:, :, :2]
    tables_k = other if layout == "two tables" else (cos, sin)
    expected = [rotated(q, cos, sin, rows, False), rotated(k, *tables_k, rows, False), v]
    if layout == "packed":
        qkv, expected_qkv, heads = torch.stack((q, k, v), 2), torch.stack(expected, 2), None
    else:
        qkv, expected_qkv, heads = torch.cat((q, k, v), 2), torch.cat(expected, 2), 4
    keys = other if layout == "two tables" else (None, None)
    leaf = qkv.requires_grad_()
    out = rotary.apply_rotary_emb_qkv_(leaf * 1, cos, sin, *keys, seqlen_offsets=4, num_heads_q=heads)
    torch.testing.assert_close(out, expected_qkv, check_dtype=False)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(gradient, 2 * leaf.detach())  # a rotation keeps lengths

    kv = torch.stack((k, v), 2)
    assert rotary.apply_rotary_emb_kv_(kv, *tables_k, seqlen_offsets=4) is kv
    torch.testing.assert_close(kv[:, :, 0], expected[1], check_dtype=False)
    assert torch.equal(kv[:, :, 1], v)


@pytest.mark.parametrize("scale_base", [None, 8.0])
def test_module(scale_base: float | None) -> None:
    torch.manual_seed(0)
    embedding = rotary.RotaryEmbedding(16, base=100.0, scale_base=scale_base)
    assert list(embedding.state_dict()) == []
    pairs, places = torch.arange(8, dtype=torch.float64), torch.arange(9, dtype=torch.float64)
    angles = places[:, None] / 100 ** (2 * pairs / 16)
    growth = torch.ones(9, 8, dtype=torch.float64)
    if scale_base is not None:
        growth = ((2 * pairs + 0.4 * 16) / (1.4 * 16)) ** ((places[:, None] - 4) / scale_base)
    rows = torch.arange(5).expand(2, 5) + 4
    q, kv = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 2, 3, 16)
    wanted = [
        rotated(x, angles.cos() * g, angles.sin() * g, rows, False) for x, g in ((q, growth), (kv[:, :, 0], 1 / growth))
    ]
    whole = torch.cat((q[:, :, None], kv), 2)
    for kind in (torch.float32, torch.bfloat16):
        out = embedding.to(kind)(whole.to(kind, copy=True), seqlen_offset=4)
        eps = torch.finfo(kind).eps
        for actual, expected in zip(out.unbind(2), wanted, strict=False):
            assert oracle.largest_error(actual, expected) <= 8 * eps * float(expected.abs().max())
    again = rotary.RotaryEmbedding(16, base=100.0, scale_base=scale_base)
    offsets = torch.tensor([4, 4])
    with pytest.raises(ValueError, match="max_seqlen is None"):
        again(q.clone(), kv.clone(), offsets)
    queries, keys = again(q.clone(), kv.clone(), offsets, max_seqlen=9)
    torch.testing.assert_close(queries, wanted[0], check_dtype=False)
    torch.testing.assert_close(keys[:, :, 0], wanted[1], check_dtype=False)
    assert torch.equal(keys[:, :, 1], kv[:, :, 1])
    table = again._cos_cached
    again(q.clone(), kv.clone(), 1)
    assert again._cos_cached is table  # shorter: kept


def test_wrong_arguments() -> None:
    cos, sin = tables(16)
    x = torch.zeros(2, 5, 3, 16)
    for message, call in (
        ("x has shape", lambda: rotary.apply_rotary(x[0], cos, sin)),
        ("cos has shape", lambda: rotary.apply_rotary(x, cos[None], sin)),
        ("sin has shape", lambda: rotary.apply_rotary(x, cos, sin[1:])),
        ("cos has 8 columns", lambda: rotary.apply_rotary(x[..., :8], cos, sin)),
        ("seqlen_offsets has 28 ", lambda: rotary.apply_rotary(x, cos, sin, 28)),
        ("seqlen_offsets has -1 ", lambda: rotary.apply_rotary(x, cos, sin, torch.tensor([-1, 2]))),
        ("seqlen_offsets has shape", lambda: rotary.apply_rotary(x, cos, sin, torch.tensor([1]))),
        ("qkv has shape", lambda: rotary.apply_rotary_emb_qkv_(x, cos, sin)),
        ("kv has shape", lambda: rotary.apply_rotary_emb_kv_(x, cos, sin)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
