"""The ops in PyTorch's machinery: opcheck, compile, export, vmap, autocast, FLOPs, and other packages' namespaces."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import SIMULATOR, Device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode

import mfa
from mfa._ops import library

FORWARD = torch.ops.mfa.attention_forward.default
BACKWARD = torch.ops.mfa.attention_backward.default


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(lengths: tuple[int, int] = (9, 7), dim: int = 16, batch: int = 2, heads: int = 4) -> list[Tensor]:
    query, key = lengths
    return [normal(batch, heads, length, dim, seed=i) for i, length in enumerate((query, key, key))]


def forward_arguments(kind: str) -> tuple[Any, ...]:
    query, key, value = qkv()
    bias = sinks = slopes = None
    softcap, window = 0.0, (None, None)
    if kind == "B,L,H,D":
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "grouped, window":
        key, value, window = key[:, ::2], value[:, ::2], (3, 1)
    if kind == "every feature":
        bias, sinks, slopes = normal(1, 4, 9, 7), normal(4), normal(2, 4).abs()
        softcap = 5.0
    blocks = None
    if kind == "block mask":
        key, value = key[:, ::2], value[:, ::2]
        blocks = mfa.pack_block_mask(create_block_mask(mfa.masks.causal(), None, None, 9, 7, device="cpu")).data
    return (query, key, value, bias, sinks, slopes, 0.25, *window, softcap, 0.0, None, blocks)


def requiring_grad(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        argument.detach().clone().requires_grad_(argument.is_floating_point())
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    )


@pytest.mark.parametrize("kind", ["contiguous", "B,L,H,D", "grouped, window", "block mask"])
def test_opcheck_forward(device: Device, kind: str) -> None:
    arguments = tuple(a.to(device.type) if isinstance(a, Tensor) else a for a in forward_arguments(kind))
    with device.active():
        opcheck(FORWARD, arguments)


@pytest.mark.parametrize("kind", ["contiguous", "B,L,H,D", "every feature", "block mask"])
def test_opcheck_gradients(kind: str) -> None:
    opcheck(FORWARD, requiring_grad(forward_arguments(kind)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_opcheck_forward_with_correction(device: Device, dtype: torch.dtype) -> None:
    arguments = [a.to(device.type, dtype) if isinstance(a, Tensor) else a for a in forward_arguments("B,L,H,D")]
    with device.active():
        opcheck(torch.ops.mfa.attention_forward_with_correction.default, (*arguments, True))


@pytest.mark.parametrize("mask", [[True] * 6, [False, True, True, False, False, True]])
def test_opcheck_backward(mask: list[bool]) -> None:
    tensors = forward_arguments("every feature")
    out, lse = FORWARD(*tensors)
    opcheck(BACKWARD, (*tensors, torch.ones_like(out), torch.ones_like(lse), out, lse, None, mask))


def test_opcheck_composite(device: Device) -> None:
    with device.active():
        opcheck(torch.ops.mfa.attention.default, tuple(x.to(device.type) for x in qkv()), {"is_causal": True})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_is_done_once_for_all_lengths(backend: str, grad: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def model(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        hidden = mfa.attention(query, key, value, is_causal=True, window=(5, None))
        out, lse = mfa.attention(hidden, key, value, window=(None, 2), return_lse=True)
        return torch.ops.mfa.attention(out, key, value, is_causal=True).sin(), lse

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((9, 12), (20, 31), (40, 33), (64, 64), (100, 3)):
        tensors = [tensor.requires_grad_(grad) for tensor in qkv(lengths)]
        results, expected = compiled(*tensors), model(*tensors)
        torch.testing.assert_close(results, expected)
        assert results[0].stride() == expected[0].stride()
        if grad:
            gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), tensors)
            wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), tensors)
            torch.testing.assert_close(gradients, wanted)
    assert counter.frame_count == 1


@pytest.mark.simulator
def test_compiled_in_the_simulator() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mfa.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = qkv()
    with mfa.simulate() as simulation:
        out = compiled(*tensors, is_causal=True)
    assert len(simulation.launches) == 1
    torch.testing.assert_close(out, mfa.attention(*tensors, is_causal=True))


def test_export_with_dynamic_lengths() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return mfa.attention(query, key, value, is_causal=True)

    query_length, key_length = (torch.export.Dim(name, min=2, max=4096) for name in ("lq", "lk"))
    shapes = ({2: query_length}, {2: key_length}, {2: key_length})
    program = torch.export.export(Model(), tuple(qkv()), dynamic_shapes=shapes)
    assert FORWARD in [node.target for node in program.graph.nodes]
    for lengths in ((50, 60), (33, 2)):
        torch.testing.assert_close(program.module()(*qkv(lengths)), Model()(*qkv(lengths)), rtol=0, atol=0)


class TestVmap:
    """vmap equals a loop."""

    query, key, value = normal(3, 2, 4, 5, 8), normal(2, 4, 7, 8, seed=1), normal(2, 4, 3, 7, 8, seed=2)

    @pytest.mark.parametrize("device", ["cpu", SIMULATOR], indirect=True)
    def test_tensors(self, device: Device) -> None:
        def f(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return mfa.attention(query, key, value, is_causal=True, return_lse=True)

        with device.active():
            out, lse = torch.vmap(f, in_dims=(0, None, 2))(self.query, self.key, self.value)
            loop = [f(self.query[i], self.key, self.value[:, :, i]) for i in range(3)]
        torch.testing.assert_close(list(out), [x for x, _ in loop])
        torch.testing.assert_close(list(lse), [x for _, x in loop])

    @pytest.mark.parametrize(
        ("name", "dim", "term"),
        [
            ("attn_mask", 0, normal(3, 4, 5, 7)),
            ("attn_mask", None, normal(4, 5, 7)),
            ("attn_mask", None, normal(2, 4, 5, 7)),
            ("attn_mask", 1, normal(2, 3, 1, 1, 7)),
            ("attn_mask", 0, normal(3, 7) < 0.5),
            ("alibi_slopes", 0, normal(3, 4)),
            ("alibi_slopes", 1, normal(2, 3, 4)),
            ("alibi_slopes", None, normal(4)),
            ("alibi_slopes", None, normal(2, 4)),
            ("sinks", 0, normal(3, 4)),
            ("sinks", None, normal(4)),
        ],
    )
    def test_terms(self, name: str, dim: int | None, term: Tensor) -> None:
        def f(query: Tensor, term: Tensor) -> Tensor:
            return mfa.attention(query, self.key, self.key, **{name: term})

        out = torch.vmap(f, in_dims=(0, dim))(self.query, term)
        for i in range(3):
            torch.testing.assert_close(out[i], f(self.query[i], term if dim is None else term.select(dim, i)))

    @pytest.mark.parametrize("terms", [0, 3])
    def test_batched_gradients(self, terms: int) -> None:
        tensors = [x.requires_grad_() for x in (*qkv((5, 7)), normal(4, 5, 7), normal(4), normal(4).abs())]
        tensors = tensors[: 3 + terms]
        names = ("attn_mask", "sinks", "alibi_slopes")[:terms]
        out = mfa.attention(*tensors[:3], **dict(zip(names, tensors[3:], strict=True)))
        grads = normal(3, *out.shape)
        batched = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            one = torch.autograd.grad(out, tensors, grads[i], retain_graph=True)
            torch.testing.assert_close([x[i] for x in batched], list(one))


def test_autocast(device: Device) -> None:
    query, key, value = (tensor.to(device.type) for tensor in qkv())
    with device.active(), torch.autocast(device.type, dtype=torch.bfloat16):
        results = [
            mfa.attention(query, key.bfloat16(), value, is_causal=True),
            torch.ops.mfa.attention(query, key.bfloat16(), value, is_causal=True),
            torch.ops.mfa.attention_forward(
                query, key.bfloat16(), value, None, None, None, 0.25, None, 2, 0.0, 0.0, None, None
            )[0],
        ]
    with device.active():
        expected = mfa.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), is_causal=True)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_autocast_leaves_float64_and_float32_terms() -> None:
    query, key, value = qkv()
    mask, sinks = normal(9, 7), normal(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mfa.attention(query.double(), key.double(), value.double()).dtype == torch.float64
        out = mfa.attention(query, key, value, attn_mask=mask, sinks=sinks)
        assert mfa.attention(query, key, value, attn_mask=mask.half(), sinks=sinks.half()).dtype == torch.bfloat16
    expected = mfa.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), attn_mask=mask, sinks=sinks)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_flops() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv((9, 7), dim=16))
    with FlopCounterMode(display=False) as counter:
        mfa.attention(query, key, value[..., :8]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    pairs = 2 * 2 * 4 * 9 * 7  # 2 operations per multiply-accumulate; B, Hq, Lq, Lk
    assert counts[torch.ops.mfa.attention_forward_with_correction] == pairs * (16 + 8)
    assert counts[torch.ops.mfa.attention_backward] == pairs * (3 * 16 + 2 * 8)


def test_meta_tensors_have_the_real_layout() -> None:
    query, key, value = qkv()
    for tensor in (query, heads_last(query), query.expand(2, 4, 9, 16)):
        real = mfa.attention(tensor, key, value, return_lse=True)
        meta = mfa.attention(tensor.to("meta"), key.to("meta"), value.to("meta"), return_lse=True)
        for a, b in zip(real, meta, strict=True):
            assert (a.shape, a.stride(), a.dtype, b.device.type) == (b.shape, b.stride(), b.dtype, "meta")


def heads_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("lengths", [(9, 7), (1, 7), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, heads_last, lambda x: x[:1].expand(x.shape)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 4])
def test_fake_results_have_the_real_layout(
    lengths: tuple[int, int], layout: Any, dtype: torch.dtype, heads: int, device: Device
) -> None:
    """In dimensions of size 1 as well: torch.compile compares them. And of what nobody wants."""
    query, key, value = (layout(tensor[:, :heads].to(device.type, dtype)) for tensor in qkv(lengths))
    for bias, wanted in ((None, [True] * 3 + [False] * 3), (torch.ones(1, 1, 1, lengths[1]), [False, True] * 3)):
        bias = None if bias is None else bias.to(query)
        slopes = None if bias is None else torch.ones(query.shape[1], device=query.device)
        terms = (bias, slopes, slopes, 0.25, None, None, 0.0, 0.0, None, None)

        def both(query: Tensor, key: Tensor, value: Tensor, terms: Any = terms, wanted: Any = wanted) -> list[Tensor]:
            ops = torch.ops.mfa
            out, lse = ops.attention_forward(query, key, value, *terms)
            out_too, lse_too, correction = ops.attention_forward_with_correction(query, key, value, *terms, True)
            given = (out_too, None, out_too, lse_too, correction if query.dtype.itemsize == 2 else None, wanted)
            grads = ops.attention_backward(query, key, value, *terms, *given)
            return [out, lse, out_too, lse_too, correction, *grads]

        with device.active():
            real = both(query, key, value)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = both(*(mode.from_tensor(tensor) for tensor in (query, key, value)))
        for index, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), index


def test_other_arguments_than_the_schema_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a libmfa of another version."""
    library.check_signatures()
    arguments, results = library.SIGNATURES["attention_forward"]
    for wrong in ((arguments[::-1], results), (arguments, ("out",))):
        monkeypatch.setitem(library.SIGNATURES, "attention_forward", wrong)
        with pytest.raises(ImportError, match=r"mfa::attention_forward has arguments and results .* they must be "):
            library.check_signatures()


def test_inference_mode() -> None:
    with torch.inference_mode():
        tensors = qkv()
        out = mfa.attention(*tensors)
    torch.testing.assert_close(out, mfa.attention(*qkv()), rtol=0, atol=0)


OTHER = """
import torch
{before}
library = torch.library.Library("mfa", "DEF")  # as mps-flash-attn does
library.define("forward(Tensor query) -> Tensor")
library.impl("forward", lambda query: query + 1, "CPU")
{after}
query = torch.ones(1, 1, 4, 8)
assert torch.equal(torch.ops.mfa.forward(query), query + 1)
torch.testing.assert_close(mfa.attention(query, query, query), query)
"""


@pytest.mark.parametrize("first", ["mfa", "the other"])
def test_another_package_may_own_the_namespace(first: str) -> None:
    before, after = ("import mfa", "") if first == "mfa" else ("", "import mfa")
    script = OTHER.format(before=before, after=after)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_import_brings_no_heavy_modules() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import mfa
print(*{"sympy", "numpy", "torch._dynamo", "torch._inductor"}.intersection(set(sys.modules) - before))
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == []
