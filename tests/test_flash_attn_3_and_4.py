"""FlashAttention-3's flash_attn_interface and FlashAttention-4's flash_attn.cute, against float64."""

import math
from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from torch import Tensor

from mfa import flash_attn
from mfa.flash_attn import cute, flash_attn_3
from mfa.flash_attn import flash_attn_interface as interface

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def inputs(length_q: int, length_k: int, batch: int = 2) -> list[Tensor]:
    """Q [B,Lq,4,16], k and v [B,Lk,2,16], and the gradient of out."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((length_q, 4), (length_k, 2), (length_k, 2), (length_q, 4))
    return [torch.randn(batch, length, heads, 16, generator=generator) for length, heads in sizes]


def chunked(length_q: int, length_k: int, chunk: int) -> Tensor:
    """bool [Lq,Lk]: a query at position i+Lk-Lq sees the keys of its chunk."""
    positions = [i + length_k - length_q for i in range(length_q)]
    return torch.tensor([[p // chunk == j // chunk for j in range(length_k)] for p in positions])


def check(results: tuple[Tensor, ...], tensors: list[Tensor], **terms: Any) -> None:
    """Out [B,Lq,H,D], lse, then the gradients of q, k, v and sinks that there are."""
    q, k, v, dout = tensors
    wanted = []
    for attend, dtype in ((oracle.attention, torch.float64), (oracle.composition, torch.float32)):
        own = dict(terms)
        leaves = [x.transpose(1, 2).to(dtype).requires_grad_() for x in (q, k, v)]
        if terms.get("sinks") is not None:
            own["sinks"] = terms["sinks"].to(dtype).requires_grad_()
            leaves.append(own["sinks"])
        out, lse = attend(*leaves[:3], **own)
        grads = torch.autograd.grad(out, leaves, dout.transpose(1, 2).to(dtype))
        wanted.append([out.transpose(1, 2), lse, *(g.transpose(1, 2) if g.dim() == 4 else g for g in grads)])
    for i, (actual, expected, plain) in enumerate(zip(results, *wanted, strict=False)):
        assert oracle.largest_error(actual.cpu(), expected) <= oracle.tolerance(plain, expected, gradient=i > 1)


def moved(device: Device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device.type) for tensor in tensors]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("length_q", "length_k"), [(9, 13), (13, 9), (16, 16), (1, 13)])
@pytest.mark.parametrize("chunk", [1, 4, 5, 40])
def test_attention_chunk(chunk: int, length_q: int, length_k: int, device: Device) -> None:
    tensors = inputs(length_q, length_k)
    *leaves, dout = (x.requires_grad_() for x in moved(device, *tensors))
    window = (6, -1) if chunk == 5 else (-1, -1)
    with device.active():
        out, lse = flash_attn_3.flash_attn_func(
            *leaves, causal=True, window_size=window, attention_chunk=chunk, softcap=2.0, return_attn_probs=True
        )
        grads = torch.autograd.grad(out, leaves, dout)
    mask = chunked(length_q, length_k, chunk)
    bounds = (6 if chunk == 5 else None, 0)
    check((out, lse, *grads), tensors, bias=mask, window=bounds, softcap=2.0)


def test_open_chunks(device: Device) -> None:
    tensors = inputs(9, 13)
    with device.active():
        out, lse = flash_attn_3.flash_attn_func(
            *moved(device, *tensors[:3]), 0.4, attention_chunk=4, return_attn_probs=True
        )
    check((out, lse), tensors, bias=chunked(9, 13, 4), scale=0.4)


def test_flash_attn_3_is_2(device: Device) -> None:
    q, k, v, _ = inputs(9, 13)
    here = moved(device, q, k, v)
    with device.active():
        expected = flash_attn.flash_attn_func(*here, 0.0, 0.3, True, (4, -1), 2.0, return_attn_probs=True)
        out, lse = flash_attn_3.flash_attn_func(
            *here, 0.3, True, window_size=(4, -1), softcap=2.0, num_splits=3, pack_gqa=True, return_attn_probs=True
        )
        alone = flash_attn_3.flash_attn_func(*here, 0.3, True, window_size=(4, -1), softcap=2.0)
    torch.testing.assert_close((out, lse), expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(alone, out, rtol=0, atol=0)
    qkv = torch.randn(2, 7, 3, 4, 16)
    expected_packed = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(flash_attn_3.flash_attn_qkvpacked_func(qkv, causal=True), expected_packed)
    heads = torch.cat((q[:, :9], k[:, :9], v[:, :9]), 2)
    grouped = flash_attn_3.flash_attn_qkvpacked_func(heads, num_heads_q=4)
    torch.testing.assert_close(grouped, flash_attn.flash_attn_func(q, k[:, :9], v[:, :9]))
    with pytest.raises(ValueError, match="qkv has 8 heads"):
        flash_attn_3.flash_attn_qkvpacked_func(heads, num_heads_q=3)


@pytest.mark.parametrize("chunk", [0, 4])
def test_seqused(chunk: int, device: Device) -> None:
    """Tokens behind those that are used may be NaN; out is 0 and lse -inf there, gradients are 0."""
    used_q, used_k, slots_q, slots_k = [5, 0, 7, 3], [9, 4, 2, 0], 8, 11
    q, k, v, dout = inputs(slots_q, slots_k, batch=4)
    for tensor, used in ((q, used_q), (k, used_k), (v, used_k)):
        for n, count in enumerate(used):
            tensor[n, count:] = math.nan
    flat = [x.flatten(0, 1) for x in (q, k, v, dout)]
    *leaves, grad = (x.requires_grad_() for x in moved(device, *flat))
    index = moved(
        device, *(torch.arange(5).int() * slots for slots in (slots_q, slots_k)), ints(*used_q), ints(*used_k)
    )
    with device.active():
        out, lse = flash_attn_3.flash_attn_varlen_func(
            *leaves,
            *index[:2],
            slots_q,
            slots_k,
            *index[2:],
            causal=True,
            attention_chunk=chunk,
            return_attn_probs=True,
        )
        grads = torch.autograd.grad(out, leaves, grad)
    outs, lses = out.unflatten(0, (4, -1)), lse.unflatten(1, (4, -1)).transpose(0, 1)
    batched = [x.unflatten(0, (4, -1)) for x in grads]
    for n, (some_q, some_k) in enumerate(zip(used_q, used_k, strict=True)):
        part = [
            x[n : n + 1, :count] for x, count in zip((q, k, v, dout), (some_q, some_k, some_k, some_q), strict=True)
        ]
        results = (outs[n : n + 1, :some_q], lses[n : n + 1, :, :some_q], batched[0][n : n + 1, :some_q])
        keys = (batched[1][n : n + 1, :some_k], batched[2][n : n + 1, :some_k])
        bias = chunked(some_q, some_k, chunk) if chunk and some_q and some_k else None
        if some_q:
            check((*results, *keys), part, window=(None, 0), bias=bias)
        assert not outs[n, some_q:].any()
        assert bool((lses[n, :, some_q:] == -math.inf).all())
        for x, count in zip(batched, (some_q, some_k, some_k), strict=True):
            assert not x[n, count:].any()


def test_block_table_of_packed_queries(device: Device) -> None:
    """Pages and table entries that no live token needs may hold anything."""
    torch.manual_seed(0)
    lengths_q, lengths_k, page = [3, 0, 5, 1], [20, 7, 9, 0], 8
    pages = [[6, 1, 3], [2, -5, 99], [0, 5, 99], [99, 99, 99]]
    k_pages, v_pages = (torch.full((8, page, 2, 16), math.nan) for _ in range(2))
    keys = [torch.randn(2, length, 2, 16) for length in lengths_k]
    for (k, v), row in zip(keys, pages, strict=True):
        for token in range(k.shape[0]):
            place = (row[token // page], token % page)
            k_pages[place], v_pages[place] = k[token], v[token]
    q = torch.randn(sum(lengths_q), 4, 16)
    starts = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    terms: dict[str, Any] = {"causal": True, "softcap": 2.0}
    expected, expected_lse, _ = flash_attn.flash_attn_varlen_func(
        *(q, *torch.cat(keys, 1).unbind(0), *starts, 5, 20), **terms, return_attn_probs=True
    )
    tensors = moved(device, q, k_pages, v_pages, *starts, torch.tensor(pages).int(), ints(*lengths_k))
    q, k_pages, v_pages, starts_q, starts_k, table, used = tensors
    with device.active():
        results = [
            flash_attn.flash_attn_varlen_func(
                *(q, k_pages, v_pages, starts_q, starts_k, 5, 20),
                **terms,
                block_table=table,
                return_attn_probs=True,
            )[:2]
        ]
        pages_of = {"cu_seqlens_q": starts_q, "max_seqlen_q": 5, "page_table": table, "return_lse": True}
        for given in ({"seqused_k": used}, {"cu_seqlens_k": starts_k, "max_seqlen_k": 20}):
            results.append(cute.flash_attn_varlen_func(q, k_pages, v_pages, **pages_of, **given, **terms))  # type: ignore[arg-type]
        queries: dict[str, Any] = {"cu_seqlens_q": starts_q, "max_seqlen_q": 5, "return_softmax_lse": True}
        three = flash_attn_3.flash_attn_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=used, page_table=table, **queries, **terms
        )
        results.append(three[:2])
    for out, lse in results:
        torch.testing.assert_close(out.cpu(), expected)
        torch.testing.assert_close(lse.cpu(), expected_lse)


def test_wrong_pages() -> None:
    k, starts = torch.zeros(4, 8, 2, 16), ints(0, 12)
    q = torch.zeros(12, 2, 16)
    table = ints(0, 1)[None]
    for message, wrong_table, cache in (
        ("page 4 at", ints(0, 4)[None], k),
        ("page -1 at", ints(-1, 0)[None], k),
        ("seqused_k is 12 at 0; it must be within 0 ... 8", ints(0)[None], k),
        ("block_table has shape", ints(0, 1), k),
        ("k has 3 dimensions", table, k[0]),
        ("page 0 at", table, k[:0]),
        ("key has pages of 4 tokens; it must be a multiple of 8", ints(0, 1, 2)[None], k[:, :4]),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn.flash_attn_varlen_func(q, cache, cache, starts, starts, 12, 12, block_table=wrong_table)
    with pytest.raises(NotImplementedError, match="and block_table is given"):
        flash_attn.flash_attn_varlen_func(q, k, k, starts, starts, 12, 12, 0.5, block_table=table)
    with pytest.raises(NotImplementedError, match="key requires grad"):
        flash_attn.flash_attn_varlen_func(q, k.clone().requires_grad_(), k, starts, starts, 12, 12, block_table=table)
    low_level = (0.0, 0.25, True, -1, -1, 0.0, None, False, table)
    with pytest.raises(ValueError, match="leftpad_k is given, and block_table too"):
        interface._flash_attn_varlen_forward(q, k, k, starts, starts, 12, 12, *low_level, ints(3))
    out = interface._flash_attn_varlen_forward(q, k, k, starts, starts, 12, 12, *low_level, None, ints(9))[0]
    assert out.shape == q.shape
    for name, more in {"k": k[:1, :1], "cache_leftpad": ints(1), "rotary_cos": q[:, 0, :4]}.items():
        with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
            flash_attn_3.flash_attn_with_kvcache(
                q, k, k, cache_seqlens=ints(12), page_table=table, cu_seqlens_q=starts, max_seqlen_q=12, **{name: more}
            )
    with pytest.raises(ValueError, match="page_table and cache_seqlens must be tensors"):
        flash_attn_3.flash_attn_with_kvcache(q, k, k, cache_seqlens=ints(12), cu_seqlens_q=starts)
    starts = ints(0, 6)
    q = q[:6]
    for name, counts in (("seqused_q", ints(7)), ("seqused_k", ints(-1))):
        with pytest.raises(ValueError, match=name):
            flash_attn_3.flash_attn_varlen_func(q, q, q, starts, starts, 6, 6, **{name: counts})
    for message, wrong in (
        ("cu_seqlens_k starts with 1", (starts, ints(1, 6), 6, 6, ints(6), ints(2))),
        ("cu_seqlens_k ends with 7", (starts, ints(0, 7), 6, 7, ints(6), ints(2))),
        ("cu_seqlens_q has shape", (ints(), ints(), 6, 6, ints(6), ints(2))),
        ("max_seqlen_k is 5", (starts, starts, 6, 5, None, None)),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attn_3.flash_attn_varlen_func(q, q, q, *wrong, attention_chunk=2)
    with pytest.raises(ValueError, match="attention_chunk"):
        flash_attn_3.flash_attn_func(q[None], q[None], q[None], attention_chunk=-1)
    with pytest.raises(TypeError, match="window_size"):
        cute.flash_attn_func(q[None], q[None], q[None], window_size=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seqused_k is None"):
        cute.flash_attn_varlen_func(q, k, k, cu_seqlens_q=starts, page_table=ints(0, 1)[None])


@pytest.mark.parametrize("case", ["open", "causal", "window", "negative"])
def test_cute(case: str, device: Device) -> None:
    tensors = inputs(9, 13)
    arguments: dict[str, Any] = {
        "open": {"window_size": (-1, -1)},
        "causal": {"causal": True},
        "window": {"window_size": (4, None)},
        "negative": {"window_size": (None, -2)},
    }[case]
    bounds = {"open": (None, None), "causal": (None, 0), "window": (4, None), "negative": (None, -2)}[case]
    *leaves, sinks, dout = (x.requires_grad_() for x in moved(device, *tensors[:3], SINKS.clone(), tensors[3]))
    with device.active():
        out, lse = cute.flash_attn_func(
            *leaves, softmax_scale=0.3, learnable_sink=sinks, softcap=2.0, return_lse=True, **arguments
        )
        grads = torch.autograd.grad(out, (*leaves, sinks), dout)
        none = cute.flash_attn_func(*leaves, **arguments)
        flat = [x.flatten(0, 1) for x in leaves]
        starts = [torch.arange(3, dtype=torch.int32, device=device.type) * length for length in (9, 13)]
        packed = cute.flash_attn_varlen_func(
            *flat,
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            softmax_scale=0.3,
            learnable_sink=sinks,
            softcap=2.0,
            return_lse=True,
            **arguments,
        )
        batched = cute.flash_attn_varlen_func(
            *leaves, softmax_scale=0.3, learnable_sink=sinks, softcap=2.0, return_lse=True, **arguments
        )
    assert lse is not None
    assert none[1] is None
    check((out, lse, *grads), tensors, scale=0.3, window=bounds, softcap=2.0, sinks=SINKS)
    torch.testing.assert_close(batched, (out, lse))
    torch.testing.assert_close(packed[0].unflatten(0, (2, 9)), out)
    assert packed[1] is not None
    torch.testing.assert_close(packed[1].unflatten(1, (2, 9)).transpose(0, 1), lse)


def test_cute_seqused() -> None:
    """Of batched tensors; a sink in bfloat16."""
    tensors = inputs(5, 11)
    sinks = SINKS.bfloat16()
    out, lse = cute.flash_attn_varlen_func(
        *tensors[:3], seqused_k=ints(9, 3), causal=True, learnable_sink=sinks, return_lse=True
    )
    assert lse is not None
    for n, used in enumerate((9, 3)):
        part = [tensors[0][n : n + 1], *(x[n : n + 1, :used] for x in tensors[1:3]), tensors[3][n : n + 1]]
        check((out[n : n + 1], lse[n : n + 1]), part, window=(None, 0), sinks=sinks)


def test_combine() -> None:
    torch.manual_seed(0)
    q, k, v, _ = inputs(5, 12)
    parts = [flash_attn.flash_attn_func(q, k[:, i : i + 4], v[:, i : i + 4], return_attn_probs=True) for i in (0, 4, 8)]
    expected, expected_lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    outs, lses = torch.stack([part[0] for part in parts]), torch.stack([part[1].transpose(1, 2) for part in parts])
    place = torch.empty_like(q)
    for out, lse in (flash_attn_3.flash_attn_combine(outs, lses), flash_attn_3.flash_attn_combine(outs, lses, place)):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse.transpose(1, 2))
    torch.testing.assert_close(place, expected)
    assert flash_attn_3.flash_attn_combine(outs, lses, None, torch.float16)[0].dtype == torch.float16


def test_compiles() -> None:
    """Without a graph break, whatever is copied."""
    q, k, v, _ = inputs(9, 13)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    starts = [torch.arange(3, dtype=torch.int32) * length for length in (9, 13)]
    pages = [torch.randn(6, 8, 2, 16) for _ in range(2)]
    table = torch.tensor([[0, 1, 5, 2], [3, 4, 1, 0]], dtype=torch.int32)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (flash_attn_3.flash_attn_func, (q, k, v), {"attention_chunk": 4, "causal": True}),
        (flash_attn_3.flash_attn_varlen_func, (*flat, *starts, 9, 13, ints(4, 9), ints(13, 2)), {}),
        (cute.flash_attn_func, (q, k, v), {"learnable_sink": SINKS, "return_lse": True}),
        (flash_attn.flash_attn_varlen_func, (flat[0], *pages, *starts, 9, 13), {"block_table": table}),
    ]
    for function, arguments, terms in calls:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments, **terms), function(*arguments, **terms))


ROWS = torch.zeros(2, 3, 2, 16)
THREE = {"qv": ROWS, "q_descale": ROWS, "k_descale": ROWS, "v_descale": ROWS}
FOUR = {
    "qv": ROWS,
    "gather_kv_indices": ROWS,
    "score_mod": max,
    "score_mod_bwd": max,
    "mask_mod": max,
    "aux_tensors": [ROWS],
    "aux_scalars": (1,),
    "block_sparse_tensors": ROWS,
    "gather_bwd_recompute_p": True,
    "gather_bwd_token_chunk": 4,
}
REFUSED = [
    *((flash_attn_3.flash_attn_func, name, value) for name, value in THREE.items()),
    *((flash_attn_3.flash_attn_varlen_func, name, value) for name, value in THREE.items()),
    *((cute.flash_attn_func, name, value) for name, value in {**FOUR, "block_sparse_tensors_bwd": ROWS}.items()),
    *((cute.flash_attn_varlen_func, name, value) for name, value in {**FOUR, "scheduler_metadata": ROWS}.items()),
]


@pytest.mark.parametrize(("function", "argument", "value"), REFUSED, ids=lambda x: getattr(x, "__name__", None))
def test_refuses_by_name(function: Any, argument: str, value: object) -> None:
    packed = (ROWS[0], ROWS[0], ROWS[0], ints(0, 3), ints(0, 3), 3, 3)
    tensors = packed if function is flash_attn_3.flash_attn_varlen_func else (ROWS, ROWS, ROWS)
    with pytest.raises(NotImplementedError, match=argument):
        function(*tensors, **{argument: value})


def test_no_metadata() -> None:
    with pytest.raises(NotImplementedError, match="get_scheduler_metadata"):
        flash_attn_3.get_scheduler_metadata(2, 1, 1, 4, 2, 16, ints(1, 2))
