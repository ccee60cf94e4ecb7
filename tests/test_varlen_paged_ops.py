"""attention_varlen_paged in PyTorch's machinery: opcheck, compile, export, vmap, autocast, FLOPs."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from serving import moved, normal, starts
from test_varlen_paged import INT32, ragged
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import mfa
from mfa._arguments import Paged

QUERIES, LENGTHS = (2, 0, 7), (5, 3, 20)


def op_arguments(**options: Any) -> Paged:
    named = ragged(QUERIES, LENGTHS, **options).arguments()
    terms = {"sinks": normal(4), "alibi_slopes": normal(3, 4).abs(), "scale": 0.25, "window_left": 20}
    return Paged(**{name: (named | terms).get(name) for name in Paged._fields} | {"softcap": 5.0, "num_splits": 2})


@pytest.mark.parametrize("formats", [(None, None), (torch.int8, None)])
def test_opcheck(device: Device, formats: tuple[torch.dtype | None, ...]) -> None:
    with device.active():
        arguments = tuple(moved(x, device) for x in op_arguments(formats=formats))
        opcheck(torch.ops.mfa.attention_varlen_paged.default, arguments)


def test_the_op_has_no_gradient() -> None:
    arguments = op_arguments()
    out, _ = torch.ops.mfa.attention_varlen_paged(*arguments._replace(query=arguments.query.requires_grad_()))
    with pytest.raises(NotImplementedError, match="attention over pages has no gradients"):
        out.sum().backward()


def test_bad_contents_are_refused_by_the_op_as_well() -> None:
    arguments = op_arguments()._replace(seqused_k=torch.tensor([5, 3, 25], dtype=INT32))
    with pytest.raises(RuntimeError, match="seqused_k is 25 at 2; it must be within 0"):
        torch.ops.mfa.attention_varlen_paged(*arguments)


@pytest.mark.parametrize("formats", [(None, None), (torch.int8, torch.int8)])
def test_compile_is_done_once_for_all_lengths(formats: tuple[torch.dtype | None, ...]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mfa.attention_varlen, fullgraph=True, dynamic=True, backend=counter)
    # No two sizes are alike in the first call: torch would take them for one.
    for queries, lengths in (((2, 0, 7, 1, 3, 0), (5, 3, 70, 9, 3, 1)), ((4, 1), (9, 17)), (QUERIES, LENGTHS)):
        named = ragged(queries, lengths, formats=formats).arguments()
        del named["softcap"]  # a float argument becomes a symbol, which torch.compile(dynamic=True) compiles twice for
        torch.testing.assert_close(step(**named), mfa.attention_varlen(**named))
    assert counter.frame_count == 1


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, used: Tensor, table: Tensor) -> Tensor:
            layout = (cu, None, 64, 64)
            return mfa.attention_varlen(query, key, value, *layout, block_table=table, seqused_k=used, is_causal=True)

    def inputs(queries: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        named = ragged(queries, lengths).arguments()
        return tuple(named[name] for name in ("query", "key", "value", "cu_seqlens_q", "seqused_k", "block_table"))

    tokens, pages, sequences, width = (torch.export.Dim(name, min=2, max=4096) for name in ("t", "p", "n", "w"))
    shapes = ({0: tokens}, {0: pages}, {0: pages}, {0: sequences + 1}, {0: sequences}, {0: sequences, 1: width})
    program = torch.export.export(Model(), inputs(QUERIES, LENGTHS), dynamic_shapes=shapes)
    other = inputs((3, 9), (9, 40))
    torch.testing.assert_close(program.module()(*other), Model()(*other), rtol=0, atol=0)


def test_vmap() -> None:
    arguments = op_arguments()
    queries = normal(2, *arguments.query.shape, seed=9)
    lengths = torch.tensor([LENGTHS, (1, 2, 3)], dtype=INT32)

    def f(query: Tensor, used: Tensor) -> Tensor:
        return torch.ops.mfa.attention_varlen_paged(*arguments._replace(query=query, seqused_k=used))[0]

    expected = [f(q, n) for q, n in zip(queries, lengths, strict=True)]
    torch.testing.assert_close(list(torch.vmap(f)(queries, lengths)), expected)


@pytest.mark.parametrize("formats", [(None, None), (torch.int8, None), (torch.int8, torch.int8)])
def test_autocast(formats: tuple[torch.dtype | None, torch.dtype | None]) -> None:
    """Pages aren't cast: what meets them is."""
    named = ragged(QUERIES, LENGTHS, dtype=torch.float16, formats=formats).arguments()
    arguments = op_arguments(dtype=torch.float16, formats=formats)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mfa.attention_varlen(**named | {"query": named["query"].float()})
        raw = torch.ops.mfa.attention_varlen_paged(*arguments._replace(query=arguments.query.float()))[0]
    assert out.dtype == raw.dtype == (torch.float16 if None in formats else torch.bfloat16)


def test_flops_are_those_of_the_live_keys() -> None:
    named = ragged(QUERIES, LENGTHS).arguments()
    with FlopCounterMode(display=False) as counter:
        mfa.attention_varlen(**named)
    assert counter.get_total_flops() == 2 * 4 * (2 * 5 + 7 * 20) * 32
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in named.items()}
    assert starts(QUERIES).equal(named["cu_seqlens_q"])
    with FlopCounterMode(display=False) as counter:
        torch.ops.mfa.attention_varlen_paged(
            *Paged(
                **{name: (meta | {"scale": 0.25}).get(name) for name in Paged._fields}
                | {"softcap": 0.0, "num_splits": 0}
            )
        )
    assert counter.get_total_flops() == 2 * 4 * 9 * 20 * 32
