"""What users of other attentions reported: the smallest call that each report describes, against float64.

A row of the table is a report's number, its title in our words, and a function. Reports in which kernels could be wrong
run on every device, the others on CPU tensors. test_peer_issues.py has those about F.scaled_dot_product_attention on
Macs.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from conftest import SIMULATOR, Device
from gradient_rule import Change, differentiate, recomputed, shares
from sdpa_cases import check_nothing_active  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import mfa
from mfa import _log, flash_attn, sdpa

HALF, BFLOAT16 = torch.float16, torch.bfloat16
LEAST = -math.inf


class Report(NamedTuple):
    number: str
    title: str
    run: Callable[[Device], None]
    kernels: bool


REPORTS: list[Report] = []


def report(number: str, title: str, *, kernels: bool = False) -> Callable[[Callable[[Device], None]], None]:
    """Adds a row. `kernels`: it runs on every device."""
    return lambda run: REPORTS.append(Report(number, title, run, kernels))


# -- what rows share ------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def qkv(
    length_q: int = 5, length_k: int = 7, dim: int = 16, *, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """[B,2,L,D]"""
    return [normal(batch, 2, length, dim, dtype=dtype) for length in (length_q, length_k, length_k)]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def at(device: Device, tree: Any) -> Any:
    """New leaves, on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device.type), tree)


def check(device: Device, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **terms: Any) -> None:
    """mfa.attention, its lse and its gradients keep to the numerics rule."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        options = {"enable_gqa": query.shape[1] != key.shape[1], "return_lse": True}
        return mfa.attention(query, key, value, at(device, mask), **at(device, terms), **options)

    compare(device, attend, [query, key, value], bias=mask, **terms)


def compare(device: Device, attend: Any, inputs: list[Tensor], **terms: Any) -> None:
    """The same for `attend`, from query, key and value to out and lse; terms are the oracle's.

    Numbers are few here, and scores may be large: then plain PyTorch's lse is exact by luck, and what an lse of 100 is
    rounded by shows in the gradients, which kernels make from it.
    """
    tensors = dict(zip(("query", "key", "value"), inputs, strict=True))
    grads = (normal(*inputs[0].shape[:-1], inputs[2].shape[-1], dtype=inputs[0].dtype), None)

    def gradients(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        return differentiate(
            function, {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}, grads
        )

    def plain(change: Change) -> dict[str, Tensor]:
        composition = partial(oracle.composition, **terms)
        return gradients(change(recomputed(composition, kernels) if kernels else composition), inputs[0].dtype)

    kernels = inputs[0].dtype if device.has_kernels else None
    leaves = {name: tensor.requires_grad_() for name, tensor in at(device, tensors).items()}
    with device.active():
        found = [tensor.detach().cpu() for tensor in attend(**leaves)]
        slopes = {name: x.cpu() for name, x in differentiate(attend, leaves, at(device, grads)).items()}
    expected = oracle.attention(*inputs, **terms)
    summands = None, expected[1].abs().nan_to_num(posinf=0)
    for mine, right, composed, summed in zip(
        found, expected, oracle.composition(*inputs, **terms), summands, strict=True
    ):
        assert oracle.largest_error(mine, right) <= oracle.tolerance(composed, right, summands=summed)
    expected_slopes = gradients(partial(oracle.attention, **terms), torch.float64)
    assert max(shares(slopes, expected_slopes, plain, kernels).values()) <= 1


def check_packed(device: Device, tensors: list[Tensor], lengths: list[int], lengths_k: list[int], causal: bool) -> None:
    """mfa.attention_varlen of [T,H,D]: what each sequence is by itself, and 0 behind the last."""
    starts = [ints(*itertools.accumulate(counts, initial=0)) for counts in (lengths, lengths_k)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        longest = max(lengths), max(lengths_k)
        out, lse = mfa.attention_varlen(*packed, *at(device, starts), *longest, is_causal=causal, return_lse=True)
        return out.transpose(0, 1)[None], lse[None]

    window = (None, 0 if causal else None)
    blocks = [oracle.visible(*pair, window).float() for pair in zip(lengths, lengths_k, strict=True)]
    seen = torch.zeros(tensors[0].shape[0], tensors[1].shape[0], dtype=torch.bool)
    seen[: sum(lengths), : sum(lengths_k)] = torch.block_diag(*blocks)
    compare(device, attend, [tensor.transpose(0, 1)[None] for tensor in tensors], bias=seen)


def routed_like_math(function: Callable[[], Any], **tolerances: float) -> None:
    """A function of CPU tensors, once with torch's math and once with mfa where it calls F.sdpa."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = function()
    with sdpa.enabled(cpu=True):
        assert_close(function(), expected, **tolerances)


# -- masks and rows that see nothing --------------------------------------------------------------------------------


@report("pytorch#184180", "a mask that broadcasts in some dimensions only is read at the right place", kernels=True)
def _(device: Device) -> None:
    for sizes in itertools.product(*((1, size) for size in (2, 2, 5, 7))):
        for mask in (torch.rand(sizes) > 0.3, normal(*sizes)):
            check(device, *qkv(), mask)


@report("pytorch#188147", "NaN among the inputs isn't swallowed", kernels=True)
def _(device: Device) -> None:
    # Plain calls on the CPU are ATen's, which has zeros for a query of NaN.
    for place in range(3) if device.has_kernels else (1, 2):
        inputs = qkv()
        inputs[place][1, 0, 2, 3] = math.nan
        with device.active():
            out = mfa.attention(*at(device, inputs)).cpu()
        assert torch.equal(out.isnan(), oracle.attention(*inputs)[0].isnan())


@report("pytorch#41508", "gradients of rows that an additive mask hides from all keys are 0", kernels=True)
def _(device: Device) -> None:
    mask = torch.zeros(2, 1, 5, 7)
    mask[1] = LEAST
    check(device, *qkv(), mask)


@report("pytorch#136232", "no NaN through exp(lse) of a row that sees nothing", kernels=True)
def _(device: Device) -> None:
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    inputs = [tensor.requires_grad_() for tensor in at(device, qkv())]
    with device.active():
        out, lse = mfa.attention(*inputs, at(device, mask), return_lse=True)
        gradients = torch.autograd.grad((out * lse.exp()[..., None]).sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, 2] == 0).all()


@report("xformers#722", "any additive mask: large, small, mixed with -inf, for each head its own", kernels=True)
def _(device: Device) -> None:
    mask = 30 * normal(2, 2, 5, 7)
    check(device, *qkv(), mask.masked_fill(torch.rand(mask.shape) < 0.3, LEAST).index_fill(3, torch.tensor([1]), 1.0))


@report("mlx#2626", "masks, sinks, causal ramps and grouped heads together", kernels=True)
def _(device: Device) -> None:
    for length_q, length_k in ((1, 9), (4, 9), (9, 4)):
        query, key, value = normal(2, 6, length_q, 16), normal(2, 2, length_k, 16), normal(2, 2, length_k, 16)
        check(device, query, key, value, normal(length_q, length_k), is_causal=True, sinks=normal(6), window=(3, None))


@report("mlx#2894", "a mask whose rows are 2^31 elements apart")
def _(device: Device) -> None:
    stride = 2**31 + 64
    rows = torch.empty(stride + 7, dtype=torch.bool).as_strided(
        (2, 7), (stride, 1)
    )  # memory that nobody touches is lazy
    rows.copy_(torch.rand(2, 7) > 0.4)
    check(device, *qkv(length_q=2), rows)


# -- lengths, dimensions, numbers -----------------------------------------------------------------------------------


@report("pytorch#147443", "five dimensions are refused in a sentence, and go to ATen from F.sdpa")
def _(device: Device) -> None:
    inputs = [normal(2, 3, 2, 5, 16) for _ in range(3)]
    with pytest.raises(ValueError, match="5 dimensions"):
        mfa.attention(*inputs)
    _log.said.clear()
    routed_like_math(lambda: nn.functional.scaled_dot_product_attention(*inputs))


@report("pytorch#169222", "lengths that are no multiples of 32 read nothing out of bounds", kernels=True)
def _(device: Device) -> None:
    for length, dim in ((1, 40), (31, 64), (33, 72), (50, 80)):
        check(device, *qkv(length, length, dim, batch=1, dtype=HALF))


@report("pytorch#160841", "phi-2 in float16: scores up to 4e4, and inputs of 65504", kernels=True)
def _(device: Device) -> None:
    query, key, value = qkv(9, 9, 80, batch=1, dtype=HALF)
    query[..., 0] = key[..., 0] = 600
    full = torch.full_like(query, 65504.0)
    leaves = [tensor.requires_grad_() for tensor in at(device, [query, key, value])]
    with device.active():
        out = mfa.attention(*leaves, is_causal=True)
        slopes = torch.autograd.grad(out, leaves, torch.ones_like(out))
        largest = mfa.attention(*at(device, [full, full, full]), is_causal=True)
    expected, plain = (f(query, key, value, is_causal=True)[0] for f in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out.detach().cpu(), expected) <= oracle.tolerance(plain, expected)
    assert all(slope.isfinite().all() for slope in slopes)
    assert torch.equal(largest.cpu(), full)


@report("pytorch#133780", "empty batches, queries and keys, with gradients (flash-attention#1159)", kernels=True)
def _(device: Device) -> None:
    for sizes in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        check(device, *qkv(sizes[1], sizes[2], batch=sizes[0]), is_causal=True, softcap=3.0)


@report("flash-attention#334", "no NaN in gradients, of large inputs either (also #1052, #1947)", kernels=True)
def _(device: Device) -> None:
    for dim in (16, 128):
        inputs = qkv(33, 33, dim, batch=1, dtype=BFLOAT16)
        check(device, *inputs, is_causal=True)
        leaves = [tensor.requires_grad_() for tensor in at(device, [100 * tensor for tensor in inputs])]
        with device.active():
            out = mfa.attention(*leaves, is_causal=True)
            gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert all(tensor.isfinite().all() for tensor in (out, *gradients))


@report("mindone#310", "head dimensions of 40 and 160, as diffusion models have", kernels=True)
def _(device: Device) -> None:
    for dim in (40, 160):
        check(device, *qkv(17, 17, dim, batch=1, dtype=HALF))


@report("TabPFN#570", "more than 65,535 batches (also pyg#10766)", kernels=True)
def _(device: Device) -> None:
    query, key, value = (normal(65_600, 1, 1, 4, dtype=HALF).to(device.type) for _ in range(3))
    # With its checks on the simulator takes seconds.
    with mfa.simulate(counters=False) if device.name == "simulator" else device.active():
        assert torch.equal(mfa.attention(query, key, value), value)  # of one key


@report("flash-attention#1116", "windows at any two lengths (also #1133, nanochat#456)", kernels=True)
def _(device: Device) -> None:
    lengths, windows = ((5, 9), (9, 5), (1, 9)), ((0, 0), (2, 1), (None, 0), (3, None), (-1, 2))
    for (length_q, length_k), window in itertools.product(lengths, windows):
        check(device, *qkv(length_q, length_k, batch=1), window=window)


@report(
    "pytorch#182328", "strides that torch.compile is told are those that come (also #169778, #186850)", kernels=True
)
def _(device: Device) -> None:
    heads_last, plain = normal(2, 5, 2, 16).transpose(1, 2), normal(2, 2, 5, 16)
    expanded, sliced = normal(1, 1, 5, 16).expand(2, 2, 5, 16), normal(2, 2, 10, 32)[:, :, ::2, :16]
    for query in (heads_last, plain, expanded, sliced, plain.mT.contiguous().mT):
        inputs = at(device, [query, plain, plain])
        fake_mode = FakeTensorMode()
        fakes = [fake_mode.from_tensor(tensor) for tensor in inputs]
        with device.active():
            out = mfa.attention(*inputs)
        with fake_mode:
            told = mfa.attention(*fakes)
        assert (out.shape, out.stride()) == (told.shape, told.stride())


@report("pytorch#177116", "gradients are the same, bit by bit, after calls of other shapes", kernels=True)
def _(device: Device) -> None:
    def gradients(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in at(device, inputs)]
        with device.active():
            return list(torch.autograd.grad(mfa.attention(*leaves, is_causal=True).sum(), leaves))

    problems = [qkv(length, length, dim) for length, dim in ((5, 16), (33, 16), (5, 40))]
    first = [gradients(problem) for problem in problems]
    for problem, expected in reversed(list(zip(problems, first, strict=True))):
        assert_close(gradients(problem), expected, rtol=0, atol=0)


@report("xformers#1025", "no NaN where deterministic mode fills fresh memory with NaN", kernels=True)
def _(device: Device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2, device=device.type).isnan().all()
        check(device, *qkv(), torch.rand(5, 7) > 0.4, window=(4, None))
    finally:
        torch.use_deterministic_algorithms(False)


# -- gradients and torch.func ---------------------------------------------------------------------------------------


@report("flash-attention#1137", "lse is in natural logarithms and has a gradient (also #141, #889, pytorch#181645)")
def _(device: Device) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in qkv()]
    lse = mfa.attention(*inputs, is_causal=True, return_lse=True)[1]
    _, expected = oracle.attention(*inputs, is_causal=True)
    assert_close(lse.double(), expected, rtol=0, atol=1e-6)
    assert_close(
        torch.autograd.grad(lse.sin().sum(), inputs[:2]), torch.autograd.grad(expected.sin().sum(), inputs[:2]),
        rtol=0, atol=4e-6,
    )  # fmt: skip


@report("pytorch#116350", "a gradient penalty, with a bias and causal (also diffusers#5678)")
def _(device: Device) -> None:
    def penalty(attend: Any, inputs: list[Tensor]) -> Any:
        (slope,) = torch.autograd.grad(attend(inputs).sin().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), inputs)

    inputs = [tensor.double().requires_grad_() for tensor in (*qkv(), normal(5, 7))]
    found = penalty(lambda x: mfa.attention(*x, is_causal=True), inputs)
    assert_close(found, penalty(lambda x: oracle.attention(*x[:3], bias=x[3], is_causal=True)[0], inputs))


@report("pytorch#181177", "torch.func.grad inside of torch.compile")
def _(device: Device) -> None:
    torch._dynamo.reset()
    query, key, value = qkv()

    def slope(attend: Any) -> Any:
        return grad(lambda query: attend(query, key, value).sin().sum())

    expected = slope(lambda *inputs: oracle.attention(*inputs)[0])(query.double())
    assert_close(torch.compile(slope(mfa.attention), backend="aot_eager", fullgraph=True)(query), expected.float())


@report("pytorch#187266", "gradients of each sample, whose keys are shared (also #151558)")
def _(device: Device) -> None:
    queries, (key, value) = normal(3, 2, 5, 16), normal(2, 2, 7, 16)
    of_keys = vmap(grad(lambda key, query: mfa.attention(query, key, value).sin().sum()), (None, 0))(key, queries)
    for found, query in zip(of_keys, queries.double(), strict=True):
        wide = key.double()
        expected = grad(lambda key: oracle.attention(query[None], key[None], value[None])[0].sin().sum())(wide)  # noqa: B023
        assert_close(found, expected.float())


@report("pytorch#102457", "an ensemble of attention layers by stack_module_state (also #110525)")
def _(device: Device) -> None:
    layers = [nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = normal(2, 5, 16)

    def run(parameters: Any, buffers: Any) -> Tensor:
        out, _ = functional_call(layers[0], (parameters, buffers), (x, x, x), {"need_weights": False})
        return out

    expected = torch.stack([layer(x, x, x, need_weights=False)[0] for layer in layers])
    with sdpa.enabled(cpu=True):
        assert_close(vmap(run)(parameters, buffers), expected)


@report("flash-attention#2876", "inputs changed in place before the backward pass raise", kernels=True)
def _(device: Device) -> None:
    for place in range(4):
        leaves = [tensor.requires_grad_() for tensor in at(device, [*qkv(), normal(5, 7)])]
        inputs = [leaf * 1 for leaf in leaves]
        with device.active():
            out = mfa.attention(*inputs)
            inputs[place].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


@report("OLMo-core#828", "dropout under checkpointing drops the same again", kernels=True)
def _(device: Device) -> None:
    inputs = at(device, qkv())
    gradients = []
    for way in (None, True, False):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.manual_seed(1)
        with device.active():
            attend = mfa.attention if way is None else lambda *x: checkpoint(mfa.attention, *x, use_reentrant=way)  # noqa: B023
            gradients.append(torch.autograd.grad(attend(*leaves, None, 0.3).sum(), leaves) if way is not True else None)
            if way is True:  # which only backward() goes through
                attend(*leaves, None, 0.3).sum().backward()
                gradients[-1] = tuple(leaf.grad for leaf in leaves)
    for others in gradients[1:]:
        assert_close(others, gradients[0], rtol=0, atol=0)


# -- torch's layers, autocast, export -------------------------------------------------------------------------------


@report("pytorch#97409", "nn.MultiheadAttention in training, bool and float masks (also #97128, #97605, #107084)")
def _(device: Device) -> None:
    layer = nn.MultiheadAttention(24, 3, kdim=16, vdim=8, bias=False, add_bias_kv=True, batch_first=True)
    query, key, value = normal(2, 5, 24), normal(2, 7, 16), normal(2, 7, 8)
    hidden = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for mask in (None, torch.rand(5, 7) < 0.2, normal(5, 7)):
        padding = hidden if mask is None or mask.dtype == torch.bool else torch.zeros(2, 7).masked_fill(hidden, LEAST)
        options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": False}
        routed_like_math(lambda: layer(query, key, value, **options)[0])  # noqa: B023


@report("pytorch#151667", "nn.MultiheadAttention, dropout and a row of padding only: finite, and gradients too")
def _(device: Device) -> None:
    layer = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)
    x = normal(2, 5, 16).requires_grad_()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    with sdpa.enabled(cpu=True):
        out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@report(
    "pytorch#99012", "a float32 mask beside autocast's bfloat16 (also #119131, #126053, diffusers#6774)", kernels=True
)
def _(device: Device) -> None:
    inputs, mask = qkv(), normal(5, 7)
    rounded = [tensor.to(BFLOAT16) for tensor in inputs]
    with device.active(), torch.autocast(device.type, BFLOAT16):
        query, key, value = at(device, inputs)
        out = mfa.attention(query.to(BFLOAT16), key, value, at(device, mask))
    assert out.dtype == BFLOAT16
    expected, plain = (attend(*rounded, bias=mask)[0] for attend in (oracle.attention, oracle.composition))
    assert oracle.largest_error(out.cpu(), expected) <= oracle.tolerance(plain, expected)


@report("pytorch#149425", "an exported program takes a batch and a length of 1 (also transformers#41559)")
def _(device: Device) -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return mfa.attention(query, key, value, is_causal=True)

    batch, length = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "length"))
    sizes = {0: batch, 2: length}
    program = torch.export.export(Attention(), tuple(qkv(5, 5)), dynamic_shapes=(sizes, sizes, sizes))
    inputs = qkv(1, 1, batch=1)
    assert_close(program.run_decompositions().module()(*inputs), inputs[2])


@report("pytorch#153472", "nested tensors are refused in a sentence by mfa.attention (also #138993, fvdb-core#364)")
def _(device: Device) -> None:
    for layout, parts in (
        (torch.strided, [normal(2, 5, 16), normal(2, 7, 16)]),
        (torch.jagged, [normal(5, 2, 16), normal(7, 2, 16)]),
    ):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        with pytest.raises(NotImplementedError, match="query has layout nested"):
            mfa.attention(nested, nested, nested)
        with pytest.raises(NotImplementedError, match="query has layout nested"):
            mfa.attention_varlen(nested, nested, nested, ints(0, 1), ints(0, 1), 1, 1)
        with pytest.raises(NotImplementedError, match="query has layout nested"):
            mfa.attention_with_kv_cache(nested, nested, nested, cache_seqlens=1)


# -- packed sequences -----------------------------------------------------------------------------------------------


@report("flash-attention#443", "packed, causal, more queries than keys: rows without keys have no NaN", kernels=True)
def _(device: Device) -> None:
    for dtype in (torch.float32, HALF):
        tensors = [normal(tokens, 2, 16, dtype=dtype) for tokens in (14, 8, 8)]
        check_packed(device, tensors, [9, 5], [3, 5], causal=True)


@report("pytorch#176793", "tokens behind cu_seqlens[-1] are 0 (also #188933, flash-attention#752, #2324)", kernels=True)
def _(device: Device) -> None:
    for dtype in (torch.float32, BFLOAT16):
        tensors = [normal(tokens, 2, 16, dtype=dtype) for tokens in (12, 13, 13)]
        check_packed(device, tensors, [4, 5], [5, 4], causal=True)


@report("flash-attention#1537", "max_seqlen of 1, and sequences without tokens", kernels=True)
def _(device: Device) -> None:
    check_packed(device, [normal(3, 2, 16) for _ in range(3)], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1], causal=False)


@report("flash-attention#2562", "packed sequences without queries, D 256, with gradients", kernels=True)
def _(device: Device) -> None:
    tensors = [normal(tokens, 2, 256, dtype=BFLOAT16) for tokens in (4, 9, 9)]
    check_packed(device, tensors, [0, 4, 0], [3, 4, 2], causal=True)


@report("xformers#1122", "cu_seqlens that say more keys than there are is refused")
def _(device: Device) -> None:
    query, key, value = (normal(5, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        mfa.attention_varlen(query, key, value, ints(0, 5), ints(0, 9), 5, 9)


# -- caches ---------------------------------------------------------------------------------------------------------


def check_cached(
    device: Device, cache: list[Tensor], lengths: list[int], new: int, rows: list[int], **given: Any
) -> None:
    """flash_attn_with_kvcache [B,L,H,D]: `lengths` before the call, in the cache's entries `rows`."""
    count = len(lengths)
    query, key, value = (normal(count, new, heads, 16) for heads in (4, 2, 2))
    caches = at(device, cache)
    arguments = (at(device, query), *caches, at(device, key), at(device, value))
    with device.active(), torch.no_grad():
        out = flash_attn.flash_attn_with_kvcache(
            *arguments, cache_seqlens=at(device, ints(*lengths)), causal=True, **at(device, given)
        ).cpu()
    for entry, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        live = [torch.cat((old[row, :length], more[entry])) for old, more in zip(cache, (key, value), strict=True)]
        inputs = [x[None].transpose(1, 2) for x in (query[entry], *live)]
        expected, plain = (f(*inputs, window=(None, 0))[0] for f in (oracle.attention, oracle.composition))
        found = out[entry : entry + 1].transpose(1, 2)
        assert oracle.largest_error(found, expected) <= oracle.tolerance(plain, expected)
        for after, wanted in zip(caches, live, strict=True):
            assert torch.equal(after[row, : length + new].cpu(), wanted)


@report(
    "flash-attention#1402", "several new queries on a cache of ragged lengths (also sgl-kernel-xpu#196)", kernels=True
)
def _(device: Device) -> None:
    for new in (1, 3, 12):
        check_cached(device, [normal(3, 48, 2, 16) for _ in range(2)], [0, 17, 32], new, [0, 1, 2])


@report("flash-attention#772", "cache_batch_idx: tokens are appended to the entries that it names", kernels=True)
def _(device: Device) -> None:
    cache = [normal(4, 24, 2, 16) for _ in range(2)]
    check_cached(device, cache, [5, 11], 2, [3, 1], cache_batch_idx=ints(3, 1))


@report("flash-attention#638", "tokens behind the cache's end are refused")
def _(device: Device) -> None:
    query, cache = normal(1, 2, 3, 16), normal(1, 2, 8, 16)
    with pytest.raises(ValueError, match="cache_seqlens"):
        mfa.attention_with_kv_cache(query, cache, cache.clone(), query, query, cache_seqlens=6)


@report("flash-attention#1417", "a slice of a cache, and cache_seqlens, are the same", kernels=True)
def _(device: Device) -> None:
    query, key, value = at(device, qkv(1, 48))
    with device.active(), torch.no_grad():
        sliced = mfa.attention_with_kv_cache(query, key[:, :, :30], value[:, :, :30], cache_seqlens=30)
        whole = mfa.attention_with_kv_cache(query, key, value, cache_seqlens=30)
    inputs = [query.cpu(), key[:, :, :30].cpu(), value[:, :, :30].cpu()]
    expected, plain = (attend(*inputs)[0] for attend in (oracle.attention, oracle.composition))
    for out in (sliced, whole):
        assert oracle.largest_error(out.cpu(), expected) <= oracle.tolerance(plain, expected)


def paged(page: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Pools [pages,Hkv,page,D], a table with junk behind its live pages, and lengths."""
    pools = [normal(6, 2, page, 16) for _ in range(2)]
    pools[0][5], pools[1][5] = math.nan, math.nan
    return pools, ints(4, 0, 5, 2, 1, 3).view(2, 3), ints(page + 1, 3 * page)


@report("flash-attention#1579", "pages of 8, 16 and 256; of 1 they are refused (also #1999)", kernels=True)
def _(device: Device) -> None:
    query = normal(2, 4, 1, 16)
    for page in (8, 16, 256):
        pools, table, lengths = paged(page)
        with device.active(), torch.no_grad():
            out = mfa.attention_with_kv_cache(
                *at(device, [query, *pools]), cache_seqlens=at(device, lengths), block_table=at(device, table)
            ).cpu()
        for entry, length in enumerate(lengths.tolist()):
            keys = [torch.cat([pool[i] for i in table[entry].tolist()], 1)[None, :, :length] for pool in pools]
            inputs = [query[entry : entry + 1], *keys]
            expected, plain = (attend(*inputs)[0] for attend in (oracle.attention, oracle.composition))
            assert oracle.largest_error(out[entry : entry + 1], expected) <= oracle.tolerance(plain, expected)
    pools, table, lengths = paged(1)
    with pytest.raises((ValueError, NotImplementedError), match="page"):
        mfa.attention_with_kv_cache(query, *pools, cache_seqlens=lengths, block_table=table)


@report("flash-attention#2709", "a page that isn't there is refused, where a live token needs it (also vllm#15113)")
def _(device: Device) -> None:
    query = normal(2, 4, 1, 16)
    pools, table, lengths = paged(8)
    table[0, 2] = 99  # behind the live ones
    assert mfa.attention_with_kv_cache(query, *pools, cache_seqlens=lengths, block_table=table).isfinite().all()
    for number in (99, -1):
        table[1, 1] = number
        with pytest.raises(ValueError, match="block_table"):
            mfa.attention_with_kv_cache(query, *pools, cache_seqlens=lengths, block_table=table)


@report("flash-attention#907", "ALiBi is the same in training, packed and on a cache", kernels=True)
def _(device: Device) -> None:
    query, key, value = qkv(9, 9)
    slopes = torch.tensor([0.5, 0.1])
    starts = at(device, ints(0, 9, 18))
    options = at(device, {"alibi_slopes": slopes})
    there = at(device, [query, key, value])
    with device.active(), torch.no_grad():
        dense = mfa.attention(*there, window=(None, 0), **options)
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in there]
        packed = mfa.attention_varlen(*flat, starts, starts, 9, 9, is_causal=True, **options)
        last = mfa.attention_with_kv_cache(there[0][:, :, -1:], *there[1:], cache_seqlens=9, **options)
    terms = {"alibi_slopes": slopes, "window": (None, 0)}
    expected, plain = (f(query, key, value, **terms)[0] for f in (oracle.attention, oracle.composition))
    for out, wanted in (
        (dense, expected),
        (packed.unflatten(0, (2, 9)).transpose(1, 2), expected),
        (last, expected[:, :, -1:]),
    ):
        assert oracle.largest_error(out.cpu(), wanted) <= oracle.tolerance(plain, expected)


@report("llama.cpp#9187", "8-bit caches of zeros, tiny numbers, outliers and 65504", kernels=True)
def _(device: Device) -> None:
    rows = normal(1, 2, 8, 16)
    rows[:, :, 1], rows[:, :, 2], rows[:, :, 3, 5], rows[:, :, 4] = 0, 1e-30, 1e4, 65504
    query = normal(1, 4, 1, 16) / 1e5  # so that no key decides alone
    for dtype in (torch.int8, torch.float8_e4m3fn):
        cache, scale = mfa.quantize_kv(rows, dtype)
        with device.active(), torch.no_grad():
            arguments = at(device, [query, cache, cache])
            options = at(device, {"key_scale": scale, "value_scale": scale})
            out = mfa.attention_with_kv_cache(*arguments, cache_seqlens=8, **options).cpu()
        wide = cache.double() * scale.double()[..., None]
        assert ((wide - rows).abs() <= rows.abs().amax(-1, keepdim=True) / 16).all()  # float8 has 4 bits
        expected, plain = (
            oracle.attention(query, wide, wide)[0],
            oracle.composition(query, wide.float(), wide.float())[0],
        )
        assert oracle.largest_error(out, expected) <= oracle.tolerance(plain, expected)


# -- merging --------------------------------------------------------------------------------------------------------


@report("ring-flash-attention#42", "merging chunks, also of no keys (also #46, #47, EasyContext#14)", kernels=True)
def _(device: Device) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ends = [0, 3, 3, 4, 9, 9, 11]
        parts = [
            mfa.attention(query, key[:, :, first:last], value[:, :, first:last], return_lse=True)
            for first, last in itertools.pairwise(ends)
        ]
        merged = parts[0]
        for part in parts[1:]:
            merged = mfa.merge_attention(*merged, *part)
        return merged

    compare(device, attend, qkv(5, 11))


@report("vllm-xpu-kernels#479", "merging with an lse of -inf or 1e30 has no NaN")
def _(device: Device) -> None:
    out, nothing = normal(1, 2, 3, 16), torch.full((1, 2, 3, 16), math.nan)
    lse, unseen, large = normal(1, 2, 3), torch.full((1, 2, 3), LEAST), torch.full((1, 2, 3), 1e30)
    assert_close(mfa.merge_attention(out, lse, nothing, unseen), (out, lse))
    assert_close(mfa.merge_attention(out, large, 2 * out, lse), (out, large))
    both = mfa.merge_attention(nothing, unseen, nothing, unseen)
    assert_close(both, (torch.zeros_like(out), unseen))


CASES = [
    pytest.param(row, name, id=f"{row.number}-{name}", marks=marks)
    for row in REPORTS
    for name, marks in (("cpu", ()), ("simulator", SIMULATOR.marks), ("mps", pytest.mark.mps))
    if row.kernels or name == "cpu"
]


@pytest.mark.parametrize(("row", "device"), CASES, indirect=["device"])
def test_report(row: Report, device: Device) -> None:
    torch.manual_seed(0)
    row.run(device)
