"""mfa.attention_varlen against float64, sequence by sequence, and what has to hold exactly."""

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import Device
from gradient_rule import Change, shares
from hypothesis import given, seed, settings
from serving import (
    DTYPES,
    Packed,
    by_sequence,
    moved,
    normal,
    packed_problems,
    starts,
)
from torch import Tensor

import mfa


def check(problem: Packed, device: Device) -> None:
    """The numerics rule for out and lse; and the same result, bit by bit, whatever the order of execution."""
    arguments, terms = problem.arguments()
    expected = by_sequence(oracle.attention, arguments, terms)
    plain = by_sequence(oracle.composition, arguments, terms)
    results = []
    for order in (0, 1) if device.name == "simulator" else (0,):
        with device.active(seed=order):
            results.append(
                mfa.attention_varlen(
                    *(moved(x, device) for x in arguments),
                    **{name: moved(term, device) for name, term in terms.items()},
                    return_lse=True,
                )
            )
    out, lse = (result.cpu() for result in results[0])
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    for actual, reference, torchs in zip((out, lse), expected, plain, strict=True):
        assert actual.shape == reference.shape
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(torchs, reference)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("shard", "uses"), [*((shard, "all keys") for shard in range(8)), (8, "some"), (9, "some")])
def test_random_problems(device: Device, shard: int, uses: str) -> None:
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)

    @seed(shard)
    @settings(max_examples=30)
    @given(packed_problems(dtypes=dtypes))
    def holds(problem: Packed) -> None:
        check(replace(problem, uses=uses), device)

    holds()


def gradients(
    function: Any, arguments: tuple[Any, ...], terms: dict[str, Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Of a sum of out, and of lse where it is finite, with random weights."""
    inputs = [*arguments[:3], terms.get("sinks"), terms.get("alibi_slopes")]
    inputs = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    extra = {name: x for name, x in zip(("sinks", "alibi_slopes"), inputs[3:], strict=True) if x is not None}
    generator = torch.Generator().manual_seed(1)
    loss = sum(x.sum().cpu().double() * 0 for x in inputs if x is not None)  # so that each has a gradient
    for output in function((*inputs[:3], *arguments[3:]), {**terms, **extra}):
        weight = torch.randn(output.shape, generator=generator).to(arguments[0].dtype)
        loss = loss + torch.where(output.isfinite().cpu(), output.cpu().double(), 0).mul(weight.cpu()).sum()
    wanted = [x for x in inputs if x is not None]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, found, strict=True)]


def check_gradients(problem: Packed, device: Device) -> None:
    """The numerics rule for the gradients of query, key, value, sinks and slopes, through out and lse."""
    arguments, terms = problem.arguments()
    names = ["query", "key", "value", *(name for name in ("sinks", "alibi_slopes") if name in terms)]
    wide = torch.promote_types(problem.dtype, torch.float32)

    def product(arguments: tuple[Any, ...], terms: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return mfa.attention_varlen(*arguments, **terms, return_lse=True)

    def reference(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        found = gradients(lambda a, t: by_sequence(function, a, t), arguments, terms, dtype)
        return dict(zip(names, found, strict=True))

    def plain(change: Change) -> dict[str, Tensor]:
        found = reference(change(oracle.composition), wide)
        return {name: grad.to(problem.dtype) if name in names[:3] else grad for name, grad in found.items()}

    expected = reference(oracle.attention, torch.float64)
    with device.active():
        there = tuple(moved(x, device) for x in arguments)
        ours = gradients(product, there, {name: moved(term, device) for name, term in terms.items()})
    found = {name: actual.cpu() for name, actual in zip(names, ours, strict=True)}
    for name, actual in found.items():
        assert actual.shape == expected[name].shape
    for name, share in shares(found, expected, plain, problem.dtype if device.has_kernels else None).items():
        assert share <= 1, name


@pytest.mark.parametrize(("shard", "uses"), [*((shard, "all keys") for shard in range(4)), (4, "some")])
def test_gradients(device: Device, shard: int, uses: str) -> None:
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)

    @seed(shard)
    @settings(max_examples=30)
    @given(packed_problems(dtypes=dtypes))
    def holds(problem: Packed) -> None:
        check_gradients(replace(problem, uses=uses), device)

    holds()


LENGTHS = ((5, 9), (0, 4), (33, 33), (1, 0), (12, 3))


def arguments(device: Device, lengths: tuple[tuple[int, int], ...] = LENGTHS, **options: Any) -> tuple[Any, ...]:
    options = {"dtype": torch.float32, "key_heads": 2, "group": 2, "spare": (0, 0), "dims": (32, 32), **options}
    return tuple(moved(x, device) for x in Packed(lengths=lengths, **options).arguments()[0])


def test_two_runs_are_bitwise_equal(device: Device) -> None:
    query, key, value, *layout = arguments(device)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    results = []
    with device.active():
        for _ in range(2):
            out, lse = mfa.attention_varlen(*tensors, *layout, is_causal=True, return_lse=True)
            results.append((out, lse, *torch.autograd.grad(out.square().sum(), tensors)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_equal_lengths_are_a_dense_batch(device: Device) -> None:
    """Causal is aligned to the lower right here, and to the upper left there."""
    dense = [normal(3, heads, length, 32, seed=length) for heads, length in ((4, 20), (2, 33), (2, 33))]
    packed = [x.transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for x in dense]
    dense = [x.requires_grad_() for x in dense]
    layout = starts([20] * 3), starts([33] * 3), 20, 33
    with device.active():
        out, lse = mfa.attention_varlen(*packed, *layout, is_causal=True, window=(9, None), return_lse=True)
        whole, whole_lse = mfa.attention(*dense, window=(9, 0), enable_gqa=True, return_lse=True)
        grads = torch.autograd.grad(out.square().sum(), packed)
        whole_grads = torch.autograd.grad(whole.square().sum(), dense)
    torch.testing.assert_close(out, whole.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(lse, whole_lse.transpose(0, 1).flatten(1))
    torch.testing.assert_close(list(grads), [x.transpose(1, 2).flatten(0, 1) for x in whole_grads])


@pytest.mark.parametrize("dropout_p", [0.25, 0.8])
def test_dropout_is_that_of_a_dense_batch(device: Device, dropout_p: float) -> None:
    """Keyed on (sequence, head, query, key): the packing, and shorter sequences beside it, don't matter."""
    dense = [normal(3, heads, length, 32, seed=length) for heads, length in ((4, 20), (2, 33), (2, 33))]
    leaves = [x.to(device.type).requires_grad_() for x in dense]
    lengths = [20, 0, 7], [33, 5, 33]
    packed = [
        torch.cat([x[n, :, : counts[n]].transpose(0, 1) for n in range(3)]).to(device.type).requires_grad_()
        for x, counts in zip(dense, (lengths[0], lengths[1], lengths[1]), strict=True)
    ]
    layout = moved(starts(lengths[0]), device), moved(starts(lengths[1]), device), 20, 33
    with device.active():
        torch.manual_seed(3)
        out = mfa.attention_varlen(*packed, *layout, dropout_p=dropout_p)
        torch.manual_seed(3)
        again = mfa.attention_varlen(*packed, *layout, dropout_p=dropout_p)
        other = mfa.attention_varlen(*packed, *layout, dropout_p=dropout_p)
        torch.manual_seed(3)
        whole = mfa.attention(*leaves, dropout_p=dropout_p, enable_gqa=True)
        grads = torch.autograd.grad(out[:20].square().sum(), packed)
        whole_grads = torch.autograd.grad(whole[0].square().sum(), leaves)
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    torch.testing.assert_close(out, torch.cat([whole[0].transpose(0, 1), whole[2, :, :7].transpose(0, 1)]))
    for grad, reference, count in zip(grads, whole_grads, (20, 33, 33), strict=True):
        torch.testing.assert_close(grad[:count], reference[0].transpose(0, 1))
        assert (grad[count:] == 0).all()


def test_sinks_may_have_the_dtype_of_the_query(device: Device) -> None:
    query, key, value, *layout = arguments(device, dtype=torch.float16)
    sinks = moved(normal(4, dtype=torch.float16), device).requires_grad_()
    with device.active():
        out, expected = (mfa.attention_varlen(query, key, value, *layout, sinks=x) for x in (sinks, sinks.float()))
        assert torch.autograd.grad(out.float().sum(), sinks)[0].dtype == torch.float16
    assert torch.equal(out, expected)


def test_permuting_the_sequences_permutes_the_output(device: Device) -> None:
    problem = [(7, 20), (40, 3), (16, 64)]
    query, key, value, *_ = arguments(device, tuple(problem))
    parts = [x.split(lengths) for x, lengths in ((query, (7, 40, 16)), (key, (20, 3, 64)), (value, (20, 3, 64)))]
    order = (2, 0, 1)
    lengths = [problem[i] for i in order]
    layouts = [
        (moved(starts([a for a, _ in p]), device), moved(starts([b for _, b in p]), device), 40, 64)
        for p in (problem, lengths)
    ]
    with device.active():
        out = mfa.attention_varlen(query, key, value, *layouts[0], window=(20, 3))
        permuted = mfa.attention_varlen(*(torch.cat([x[i] for i in order]) for x in parts), *layouts[1], window=(20, 3))
    expected = torch.cat([out.split((7, 40, 16))[i] for i in order])
    torch.testing.assert_close(permuted, expected, rtol=0, atol=0)


def test_one_sequences_nan_stays_there(device: Device) -> None:
    query, key, value, *layout = arguments(device, ((9, 9), (17, 20), (30, 30)), spare=(4, 4))
    dirty = [x.clone() for x in (query, key, value)]
    for tensor in dirty:
        tensor[9 : 26 if tensor is dirty[0] else 29] = math.nan
        tensor[-4:] = math.nan
    results = []
    for tensors in ((query, key, value), dirty):
        tensors = [x.detach().requires_grad_() for x in tensors]
        with device.active():
            out, lse = mfa.attention_varlen(*tensors, *layout, is_causal=True, return_lse=True)
            loss = out[:9].sum() + out[26:].sum() + lse[:, :9].sum() + lse[:, 26:56].sum()
            results.append((out, lse, *torch.autograd.grad(loss, tensors)))
    clean, after = results
    own_rows = {
        0: (0, slice(9, 26)),
        1: (1, slice(9, 26)),
        2: (0, slice(9, 26)),
        3: (0, slice(9, 29)),
        4: (0, slice(9, 29)),
    }
    for index, (dim, rows) in own_rows.items():
        pairs = [x[index].transpose(0, dim).clone() for x in (after, clean)]
        for tensor in pairs:
            tensor[rows] = 0
        torch.testing.assert_close(pairs[0], pairs[1], rtol=0, atol=0)


def test_tokens_of_no_sequence_see_nothing(device: Device) -> None:
    query, key, value, *layout = arguments(device, spare=(6, 5))
    tensors = [x.requires_grad_() for x in (query, key, value)]
    with device.active():
        out, lse = mfa.attention_varlen(*tensors, *layout, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), tensors)
    assert (out[-6:] == 0).all()
    assert (lse[:, -6:] == -math.inf).all()
    for grad, spare in zip(grads, (6, 5, 5), strict=True):
        assert (grad[-spare:] == 0).all()
        assert not (grad[:-spare] == 0).all()


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((0, 5), (0, 0)), ((5, 0), (3, 0))])
def test_nothing_to_do(device: Device, lengths: tuple[tuple[int, int], ...]) -> None:
    query, key, value, *layout = arguments(device, lengths)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    sinks = moved(normal(4), device)
    with device.active():
        out, lse = mfa.attention_varlen(*tensors, *layout, return_lse=True)
        with_sinks = mfa.attention_varlen(*tensors, *layout, sinks=sinks, return_lse=True)[1]
        grads = torch.autograd.grad(out.sum(), tensors)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert torch.equal(with_sinks, sinks[:, None].expand(lse.shape))
    assert all((grad == 0).all() for grad in grads)


def test_gradcheck() -> None:
    layout = starts([3, 0, 4]), starts([2, 3, 5]), 4, 5
    shapes = ((7, 4, 3), (10, 2, 3), (10, 2, 2), (4,))
    inputs = tuple(normal(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes))

    def function(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return mfa.attention_varlen(query, key, value, *layout, sinks=sinks, softcap=2.0, window=(3, 1))

    assert torch.autograd.gradcheck(function, inputs)


# -- errors ---------------------------------------------------------------------------------------------------------

CPU = Device("cpu")
INT32 = torch.int32


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 5, 10])}, TypeError, "cu_seqlens_q has dtype int64; it must be int32"),
        ({"cu_seqlens_q": torch.tensor([0.0, 5.0, 10.0])}, TypeError, "cu_seqlens_q has dtype float32"),
        ({"cu_seqlens_k": torch.tensor([1, 5, 12], dtype=INT32)}, ValueError, "cu_seqlens_k starts with 1"),
        ({"cu_seqlens_q": torch.tensor([0, 11, 10], dtype=INT32)}, ValueError, "cu_seqlens_q falls from 11 to 10 at 2"),
        ({"cu_seqlens_q": torch.tensor([0, -3, 10], dtype=INT32)}, ValueError, "cu_seqlens_q falls from 0 to -3"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 13], dtype=INT32)}, ValueError, "ends with 13; .* the 12 tokens of key"),
        ({"cu_seqlens_k": torch.tensor([0, 12], dtype=INT32)}, ValueError, "cu_seqlens_k has shape \\[2\\]"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=INT32)}, ValueError, "cu_seqlens_q has shape \\[0\\]"),
        ({"cu_seqlens_q": torch.zeros(3, 1, dtype=INT32)}, ValueError, "cu_seqlens_q has shape \\[3, 1\\]"),
        ({"cu_seqlens_q": [0, 5, 10]}, TypeError, "cu_seqlens_q is of type list"),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q is 4; .* that of 0 is 5"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1"),
        ({"max_seqlen_k": 7.0}, TypeError, "max_seqlen_k is 7.0; it must be an integer"),
        ({"max_seqlen_k": torch.tensor([7])}, TypeError, "max_seqlen_k is tensor"),
        ({"query": normal(1, 10, 4, 8)}, ValueError, "query has 4 dimensions; it must have 3"),
        ({"query": normal(10, 3, 8)}, ValueError, "query has 3 heads"),
        ({"key": normal(12, 2, 8).half()}, TypeError, "key has dtype float16"),
        ({"value": normal(11, 2, 8)}, ValueError, "value has length 11"),
        ({"sinks": normal(3)}, ValueError, "sinks has shape \\[3\\]"),
        ({"alibi_slopes": normal(3, 4)}, ValueError, "alibi_slopes has shape \\[3, 4\\]; .*\\[N,Hq\\] = \\[2, 4\\]"),
        ({"alibi_slopes": normal(4).half()}, TypeError, "alibi_slopes has dtype float16"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"window": (1, 2, 3)}, TypeError, "window is"),
        ({"is_causal": 1}, TypeError, "is_causal is 1"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    layout = (starts([5, 5]), starts([5, 7]), 5, 7)
    values = dict(zip(names, (normal(10, 4, 8), normal(12, 2, 8), normal(12, 2, 8), *layout), strict=True))
    mfa.attention_varlen(**values)
    with pytest.raises(error, match=words):
        mfa.attention_varlen(**{**values, **change})


def test_bad_contents_are_refused_by_the_op_as_well(device: Device) -> None:
    query, key, value, cu_q, cu_k, *longest = arguments(device)
    if device.name == "mps":
        pytest.skip("the host does not see contents on mps")
    cu_q = cu_q.clone()
    cu_q[-1] += 1
    with device.active(), pytest.raises(RuntimeError, match="cu_seqlens_q ends with 52"):
        torch.ops.mfa.attention_varlen_forward(
            *(query, key, value, cu_q, cu_k, *longest, None, None, 1.0, None, None, 0.0, 0.0, None, None)
        )


def test_keys_that_do_not_count_are_never_read(device: Device) -> None:
    query, key, value, *layout = arguments(device)
    used, dead = torch.tensor([5, 4, 0, 0, 2], dtype=torch.int32), torch.ones(key.shape[0], dtype=torch.bool)
    for first, count in zip(layout[1].tolist(), used.tolist(), strict=False):
        dead[first : first + count] = False
    results = []
    for filling in (0.0, math.nan):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        for tensor in leaves[1:]:
            tensor.data[dead.to(device.type)] = filling
        with device.active():
            out, lse = mfa.attention_varlen(
                *leaves, *layout, seqused_k=moved(used, device), is_causal=True, return_lse=True
            )
            results.append((out, lse, *torch.autograd.grad(out.sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    for grad in results[0][3:]:
        assert (grad[dead.to(device.type)] == 0).all()


# -- what the kernels cost ------------------------------------------------------------------------------------------


def test_packing_costs_what_the_visible_blocks_need(device: Device) -> None:
    """At most 1.05 times the matrix multiplications of each sequence by itself, and no launch per sequence."""
    if device.name != "simulator":
        pytest.skip("only the simulator counts")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (16,), generator=generator).tolist()
    problem = Packed(torch.float16, 1, 1, tuple((n, n) for n in lengths), (0, 0), (64, 64))
    query, key, value, *layout = problem.arguments()[0]
    with mfa.simulate() as packed:
        mfa.attention_varlen(query, key, value, *layout, is_causal=True)
    with mfa.simulate() as alone:
        for n in range(16):
            rows = slice(int(layout[0][n]), int(layout[0][n + 1]))
            mfa.attention(*(x[rows].transpose(0, 1)[None] for x in (query, key, value)), is_causal=True)
    assert packed.counters.mma <= 1.05 * alone.counters.mma
    assert len(packed.launches) <= 2


@pytest.mark.simulator
@pytest.mark.parametrize("used", [None, (700, 20, 1500)])
def test_few_queries_read_each_key_once_for_their_group(used: tuple[int, ...] | None) -> None:
    """Tokens to decode, whose keys are packed or in slots; training in 16 bits and dropout keep the forward kernel."""
    lengths = (700, 90, 1500)
    rows = tuple((1 + n % 2, keys) for n, keys in enumerate(lengths))
    problem = Packed(torch.float16, 1, 8, rows, (0, 0), (128, 128))
    (query, key, value, *layout), _ = problem.arguments()
    terms: dict[str, Any] = {} if used is None else {"seqused_k": torch.tensor(used, dtype=INT32)}
    with mfa.simulate("apple9") as simulation:
        out, lse = mfa.attention_varlen(query, key, value, *layout, **terms, return_lse=True)
    assert [launch.kernel.split("_")[0] for launch in simulation.launches] == ["tile", "decode", "combine"]
    assert simulation.launches[1].counters.device_read_bytes <= 1.15 * 4 * 128 * sum(used or lengths)
    expected = by_sequence(
        oracle.attention, (query, key, value, *layout), {"is_causal": False, "window": (None, None), **terms}
    )
    plain = by_sequence(
        oracle.composition, (query, key, value, *layout), {"is_causal": False, "window": (None, None), **terms}
    )
    for actual, reference, torchs in zip((out, lse), expected, plain, strict=True):
        assert oracle.largest_error(actual, reference) <= oracle.tolerance(torchs, reference)
    for change in ({"dropout_p": 0.5}, {"query": query.clone().requires_grad_()}):
        with mfa.simulate("apple9") as simulation:
            named = {"query": query, "dropout_p": 0.0} | change
            mfa.attention_varlen(named["query"], key, value, *layout, **terms, dropout_p=named["dropout_p"])
        assert [launch.kernel.split("_")[0] for launch in simulation.launches] == ["tile", "forward"]
