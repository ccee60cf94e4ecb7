"""Head dimensions of 257 ... 512, and MLA's 576 with values of 512: kernels of teams of SIMD-groups, both passes."""

from typing import Any

import oracle
import pytest
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from serving import FORMATS, Cached
from strategies import DTYPES, TIMES, Problem
from test_backward import GEMMS, forced
from test_backward import check as check_backward
from test_dropout import check as check_dropout
from test_kv_cache import check
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mfa
import mfa.transformers
from mfa import _native as native
from mfa import sdpa

DIMS = st.tuples(st.integers(257, 512), st.integers(1, 512)) | st.sampled_from(
    ((320, 320), (384, 384), (512, 512), (576, 512), (100, 500), (260, 64))
)
BOUNDS = st.none() | st.integers(-5, 40)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and value, and terms as the oracle's."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, key_heads, group = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (1, 2, 3))))
    lengths = draw(st.sampled_from((1, 7, 8, 17, 40))), draw(st.sampled_from((1, 8, 15, 33, 65)))
    dim, value_dim = draw(DIMS)

    def rows(heads: int, length: int, width: int) -> Tensor:
        heads_last = torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
        return heads_last if draw(st.booleans()) else heads_last.contiguous()

    heads = key_heads * group
    tensors = [rows(heads, lengths[0], dim), rows(key_heads, lengths[1], dim), rows(key_heads, lengths[1], value_dim)]
    bias = {
        "none": None,
        "mask": torch.rand(batch, 1, *lengths, generator=generator) < 0.7,
        "float": torch.randn(1, heads, *lengths, generator=generator),
    }[draw(st.sampled_from(("none", "none", "mask", "float")))]
    terms = {"bias": bias, "window": draw(st.just((None, None)) | st.tuples(BOUNDS, BOUNDS))}
    terms["softcap"] = draw(st.sampled_from((0.0, 0.0, 5.0)))
    if draw(st.booleans()):
        terms["sinks"] = torch.randn(heads, generator=generator)
    if draw(st.booleans()):
        terms["alibi_slopes"] = torch.rand(heads, generator=generator)
    return tensors, terms


@pytest.mark.parametrize("shard", range(4))
def test_random_problems(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=25)
    @given(problems())
    def holds(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
        tensors, terms = problem
        own = {name: x.to(device.type) if isinstance(x, Tensor) else x for name, x in terms.items()}
        mask = own.pop("bias")
        results = []
        for order in (0, 1) if device.name == "simulator" else (0,):
            with device.active(seed=order):
                inputs = (x.to(device.type) for x in tensors)
                grouped = tensors[0].shape[1] != tensors[1].shape[1]
                results.append(
                    [x.cpu() for x in mfa.attention(*inputs, mask, enable_gqa=grouped, return_lse=True, **own)]
                )
        expected, plain = oracle.attention(*tensors, **terms), oracle.composition(*tensors, **terms)
        for actual, reference, composed in zip(results[0], expected, plain, strict=True):
            assert oracle.largest_error(actual, reference) <= oracle.tolerance(composed, reference)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)

    holds()


def test_packed_sequences(device: Device) -> None:
    lengths = [5, 0, 19, 8]
    starts = torch.tensor([0, 5, 5, 24, 32], dtype=torch.int32, device=device.type)
    query, key, value = (torch.randn(32, 2, 320) for _ in range(3))
    with device.active():
        inputs = (x.to(device.type) for x in (query, key, value))
        out = mfa.attention_varlen(*inputs, starts, starts, 19, 19, is_causal=True).cpu()
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        one = [x[rows].transpose(0, 1)[None] for x in (query, key, value)]
        expected, plain = (f(*one, is_causal=True)[0] for f in (oracle.attention, oracle.composition))
        if length:
            actual = out[rows].transpose(0, 1)[None]
            assert oracle.largest_error(actual, expected) <= oracle.tolerance(plain, expected)
        first += length


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("dim", "value_dim", "bucket"), [(512, 512, 1024), (384, 384, 768), (300, 290, 640), (576, 512, 1088)]
)
def test_products_are_those_of_the_bucket(dim: int, value_dim: int, bucket: int) -> None:
    query, key, value = (torch.randn(1, 2, 64, width, dtype=torch.float16) for width in (dim, dim, value_dim))
    with mfa.simulate() as sim:
        mfa.attention(query, key, value)
    assert sim.counters.mma == 2 * 8 * 8 * bucket // 8
    assert "_team_" in sim.launches[-1].kernel


@pytest.mark.simulator
def test_a_vaes_attention_is_routed_and_makes_no_matrix() -> None:
    """One head of 512 over the pixels of a latent."""
    query, key, value = (torch.randn(1, 1, 144, 512, dtype=torch.float16) for _ in range(3))
    expected = oracle.attention(query, key, value)[0]
    with sdpa.enabled(), mfa.simulate() as sim:
        out = scaled_dot_product_attention(query, key, value)
    assert oracle.largest_error(out, expected) <= oracle.tolerance(oracle.composition(query, key, value)[0], expected)
    assert [launch.kernel.split("_")[0] for launch in sim.launches] == ["forward"]


# -- backward -------------------------------------------------------------------------------------------------------

GRADIENT_DIMS = DIMS | st.tuples(st.integers(1, 256), st.integers(257, 512))
LAYOUTS = st.sampled_from(("contiguous", "contiguous", "transposed", "padded", "strided", "one head"))


@st.composite
def trained(draw: st.DrawFn) -> Problem:
    batch, key_heads, group = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3))))
    head_dim, value_dim = draw(GRADIENT_DIMS)
    kinds = st.tuples(st.sampled_from(("bool", "float32", "query")), st.tuples(*[st.booleans()] * 4))
    return Problem(
        dtype=draw(st.sampled_from(DTYPES)),
        batch=batch,
        key_heads=key_heads,
        group=group,
        query_length=draw(st.sampled_from((0, 1, 7, 8, 9, 16, 17, 33))),
        key_length=draw(st.sampled_from((0, 1, 8, 9, 15, 17, 40))),
        head_dim=head_dim,
        value_dim=value_dim,
        layouts=draw(st.tuples(LAYOUTS, LAYOUTS, LAYOUTS)),
        window=draw(st.just((None, None)) | st.tuples(BOUNDS, BOUNDS)),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, -0.04))),
        softcap=draw(st.sampled_from((0.0, 0.0, 5.0))),
        bias=draw(st.none() | kinds),
        has_sinks=draw(st.booleans()),
        alibi=draw(st.sampled_from((None, "heads", "batches"))),
        seed=draw(st.integers(0, 2**16)),
    )


def check_gradients(device: Device, shard: int, examples: int) -> None:
    """Half of the shards make five products, the others seven."""
    ratios = []

    @seed(shard)
    @settings(max_examples=examples * TIMES)
    @given(trained())
    def holds(problem: Problem) -> None:
        ratios.append(check_backward(problem, device))

    with forced([*GEMMS][shard % 2]):
        holds()
    print(f"largest error of {len(ratios)} problems: {max(ratios):.2f} of what is allowed")  # noqa: T201


@pytest.mark.parametrize("shard", range(4))
def test_random_gradients(device: Device, shard: int) -> None:
    check_gradients(device, shard, 30)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(4, 12))
def test_more_random_gradients(device: Device, shard: int) -> None:
    check_gradients(device, shard, 60)


@pytest.mark.simulator
@pytest.mark.parametrize("mode", GEMMS)
def test_gradients_with_dropout(mode: str) -> None:
    @seed(0)
    @settings(max_examples=8)
    @given(trained())
    def holds(problem: Problem) -> None:
        check_dropout(problem, 0.4, "apple7")

    with forced(mode):
        holds()


def test_gradients_of_packed_sequences(device: Device) -> None:
    lengths, generator = [5, 0, 19, 8], torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 5, 5, 24, 32], dtype=torch.int32)
    tensors = [torch.randn(32, 2, dim, generator=generator) for dim in (300, 300, 512)]
    grad, slopes = torch.randn(32, 2, 512, generator=generator), torch.tensor([[0.1, 0.2]] * 4)
    ours = [x.to(device.type).requires_grad_() for x in (*tensors, slopes)]
    with device.active():
        there = starts.to(device.type)
        out = mfa.attention_varlen(*ours[:3], there, there, 19, 19, is_causal=True, alibi_slopes=ours[3])
        found = [x.cpu() for x in torch.autograd.grad(out, ours, grad.to(device.type))]

    def gradients(function: Any, dtype: torch.dtype, sequence: int) -> list[Tensor]:
        rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
        leaves = [x[rows].transpose(0, 1)[None].to(dtype).requires_grad_() for x in tensors]
        leaves.append(slopes[sequence].to(dtype).requires_grad_())
        out = function(*leaves[:3], is_causal=True, alibi_slopes=leaves[3])[0]
        return list(torch.autograd.grad(out, leaves, grad[rows].transpose(0, 1)[None].to(out.dtype)))

    for sequence, length in enumerate(lengths):
        if length:
            rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
            expected, plain = (
                gradients(f, dtype, sequence)
                for f, dtype in ((oracle.attention, torch.float64), (oracle.composition, torch.float32))
            )
            actual = [x[rows].transpose(0, 1)[None] for x in found[:3]]
            for each, reference, composed in zip(actual, expected, plain, strict=False):
                tolerance = oracle.tolerance(composed, reference, gradient=True)
                assert oracle.largest_error(each, reference) <= tolerance
            torch.testing.assert_close(found[3][sequence].double(), expected[3], rtol=1e-4, atol=1e-4)


def backward_counters(dim: int, value_dim: int, mode: str) -> mfa.Counters:
    query, key, value = (
        torch.randn(1, 1, 128, width, dtype=torch.float16, requires_grad=True) for width in (dim, dim, value_dim)
    )
    with forced(mode), mfa.simulate() as sim:
        mfa.attention(query, key, value).sum().backward()
    return sum((launch.counters for launch in sim.launches if "backward" in launch.kernel), mfa.Counters())


@pytest.mark.simulator
@pytest.mark.parametrize("mode", GEMMS)
@pytest.mark.parametrize(("dim", "value_dim", "bucket"), [(512, 512, 512), (384, 384, 384), (300, 290, 320)])
def test_products_of_the_backward_pass_are_five_or_seven(dim: int, value_dim: int, bucket: int, mode: str) -> None:
    assert backward_counters(dim, value_dim, mode).mma == GEMMS[mode] * 16 * 16 * bucket // 8


def moved(counters: mfa.Counters) -> float:
    """Bytes of threadgroup memory per product."""
    return (counters.threadgroup_read_bytes + counters.threadgroup_write_bytes) / counters.mma


@pytest.mark.simulator
@pytest.mark.parametrize("mode", GEMMS)
def test_threadgroup_memory_of_the_backward_pass(mode: str) -> None:
    assert moved(backward_counters(512, 512, mode)) <= 1.3 * moved(backward_counters(256, 256, mode))


@pytest.mark.simulator
def test_threadgroup_memory_of_the_forward_pass() -> None:
    def forward(dim: int) -> mfa.Counters:
        query, key, value = (torch.randn(1, 1, 256, dim, dtype=torch.float16) for _ in range(3))
        with mfa.simulate() as sim:
            mfa.attention(query, key, value)
        assert [launch.kernel.split("_")[0] for launch in sim.launches] == ["forward"]
        return sim.counters

    assert moved(forward(512)) <= 1.3 * moved(forward(256))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_training_a_vae_makes_no_matrix(dtype: str) -> None:
    """One head of 512 over the 128x128 pixels of a latent: dS would take 1 GiB."""
    shape = {"query_length": 16384, "key_length": 16384, "head_dim": 512, "value_dim": 512, "dtype": dtype}
    for plan in (native.plan(**shape, wants_lse=True), native.plan_backward(**shape)):
        assert plan.scratch_bytes == plan.mask_class_bytes == 0


@pytest.mark.simulator
def test_routed_training() -> None:
    query, key, value = (torch.randn(1, 2, 40, 264, requires_grad=True) for _ in range(3))
    with sdpa.enabled(), mfa.simulate() as sim:
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        found = torch.autograd.grad(out.sum(), (query, key, value))
    assert sum("backward_dkdv" in launch.kernel for launch in sim.launches) == 1
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(oracle.attention(*leaves, is_causal=True)[0].sum(), leaves)
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.simulator
def test_training_step_of_gemma_4() -> None:
    """Its full layers have D 512, behind windows of another D."""
    hf = pytest.importorskip("transformers", reason="transformers isn't installed")
    config = hf.Gemma4TextConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5, "pad_token_id": 0},
        **{"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16},
        layer_types=["sliding_attention", "full_attention"],
        per_layer_config={"1": {"head_dim": 512}},
    )
    mfa.transformers.register()
    torch.manual_seed(0)
    eager, ours = (
        hf.Gemma4ForCausalLM._from_config(config, attn_implementation=attention) for attention in ("eager", "mfa")
    )
    ours.load_state_dict(eager.state_dict())
    tokens = torch.randint(2, 64, (2, 11))
    eager(input_ids=tokens, labels=tokens).loss.backward()
    with mfa.simulate() as sim:
        ours(input_ids=tokens, labels=tokens).loss.backward()
    assert any("backward_dkdv_f32_d512" in launch.kernel for launch in sim.launches)
    for reference, parameter in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.simulator
def test_training_step_of_deepseek_v4() -> None:
    """Layers with a sink per head, and compressed keys behind the window's, at its own D of 512."""
    pytest.importorskip("transformers", reason="transformers isn't installed")
    import transformers_models

    config = transformers_models.tiny(transformers_models.CONFIG_MAPPING["deepseek_v4"], "deepseek_v4")
    config.head_dim, config.index_head_dim = 512, 64  # the index has as many rotated dimensions: 512 / 8
    mfa.transformers.register()
    torch.manual_seed(0)
    kind = transformers_models.model_class("deepseek_v4")
    eager, ours = (kind._from_config(config, attn_implementation=attention).eval() for attention in ("eager", "mfa"))
    ours.load_state_dict(eager.state_dict())
    tokens = torch.randint(3, config.vocab_size, (2, 11))
    eager(input_ids=tokens, labels=tokens).loss.backward()
    with mfa.simulate() as sim:
        ours(input_ids=tokens, labels=tokens).loss.backward()
    assert any("backward_dkdv_f32_d512" in launch.kernel for launch in sim.launches)
    for reference, parameter in zip(eager.parameters(), ours.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6)


# -- caches ---------------------------------------------------------------------------------------------------------


@st.composite
def cached(draw: st.DrawFn) -> Cached:
    lengths = draw(st.lists(st.sampled_from((0, 1, 7, 9, 17, 33, 65)), min_size=1, max_size=2))
    page = draw(st.sampled_from((None, 8, 16)))
    return Cached(
        dtype=draw(st.sampled_from(DTYPES)),
        formats=draw(st.just((None, None)) | st.tuples(*[st.sampled_from(FORMATS)] * 2)),
        key_heads=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 3, 16))),
        lengths=tuple(lengths),
        query_length=draw(st.sampled_from((1, 2, 5))),
        new=draw(st.sampled_from((None, 1, 2))),
        page=page,
        dims=draw(DIMS),
        window=draw(st.just((None, None)) | st.tuples(BOUNDS, BOUNDS)),
        softcap=draw(st.sampled_from((0.0, 5.0))),
        has_sinks=draw(st.booleans()),
        num_splits=draw(st.sampled_from((0, 1, 3))),
        leftpad=None if page else draw(st.none() | st.tuples(*[st.integers(0, length) for length in lengths])),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.parametrize("shard", range(3))
def test_random_caches(device: Device, shard: int) -> None:
    @seed(shard)
    @settings(max_examples=20)
    @given(cached())
    def holds(problem: Cached) -> None:
        check(problem, device)

    holds()


@pytest.mark.simulator
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_decode_reads_keys_and_values_once_per_32_rows(rows: int) -> None:
    query, key, value = (torch.randn(1, heads, length, 512).half() for heads, length in ((rows, 1), (1, 512), (1, 512)))
    with mfa.simulate() as sim:
        mfa.attention_with_kv_cache(query, key, value, cache_seqlens=512, num_splits=1)
    (launch,) = sim.launches
    assert launch.counters.device_read_bytes <= 1.05 * 2 * (-(-rows // 32) * 2 * key.numel() + query.numel())
