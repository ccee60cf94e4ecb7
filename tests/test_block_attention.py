"""block_mask of mfa.attention, on every device: random masks against float64, and torch's flex_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import test_attention
import test_backward
import torch
from conftest import Device
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from largest import Largest
from strategies import DTYPES, TIMES, Problem, problems, shards
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

import mfa

attention = mfa.attention
since_2_13 = pytest.mark.skipif(torch.__version__ < (2, 13), reason="refused by a sentence, below")


@dataclass(frozen=True)
class Blocked(Problem):
    """Its bool mask hides and shows whole blocks, and parts of others."""

    density: float = 0.5
    alike: tuple[bool, bool] = (True, True)  # whether batch entries, and heads, share the mask
    block: tuple[int, int] = (128, 128)

    def _mask(self, generator: torch.Generator) -> Tensor:
        lengths = self.query_length, self.key_length
        maps = [1 if alike else size for alike, size in zip(self.alike, (self.batch, self.query_heads), strict=True)]
        coarse = torch.rand(*maps, *(length // 40 + 1 for length in lengths), generator=generator)
        for dim, length in enumerate(lengths, 2):
            coarse = coarse.repeat_interleave(40, dim).narrow(dim, 0, length)
        fine = torch.rand(coarse.shape, generator=generator) < 0.5
        return (coarse < self.density / 2) | ((coarse < self.density) & fine)


def block_mask_of(mask: Tensor, block: tuple[int, int], device: str) -> BlockMask:
    mask = mask.to(device)
    sizes = [None if size == 1 else size for size in mask.shape[:2]]
    if 0 in mask.shape[2:]:
        raise ValueError("torch makes no block masks of nothing")

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask[b * (mask.shape[0] > 1), h * (mask.shape[1] > 1), q_idx, kv_idx]

    return create_block_mask(mask_mod, *sizes, *mask.shape[2:], device=device, BLOCK_SIZE=block)


@pytest.fixture
def through_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """mfa.attention gets a bool attn_mask as block mask, of the last block size in the list."""
    blocks: list[tuple[int, int]] = []

    def blocked(*tensors: Tensor, attn_mask: Tensor, **terms: Any) -> Any:
        device = attn_mask.device.type
        return attention(*tensors, **terms, block_mask=block_mask_of(attn_mask, blocks[-1], device))

    monkeypatch.setattr(mfa, "attention", blocked)
    return blocks


@st.composite
def blocked(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Blocked:
    problem = draw(problems(dtypes=dtypes))
    lengths = st.integers(1, 300)
    block = st.integers(1, 12).map(lambda n: 16 * n)
    return Blocked(
        **{
            **problem.__dict__,
            "query_length": draw(lengths),
            "key_length": draw(lengths),
            "head_dim": min(problem.head_dim, 96),
            "value_dim": min(problem.value_dim, 96),
            "bias": ("bool", (False, False, False, False)),
        },
        density=draw(st.sampled_from((0.0, 0.2, 0.5, 0.9, 2.0))),
        alike=(draw(st.booleans()), draw(st.booleans())),
        block=(draw(block), draw(block)),
    )


@pytest.mark.parametrize("shard", shards(2, 1))
def test_random_masks(device: Device, shard: int, through_blocks: list[tuple[int, int]]) -> None:
    dtypes = DTYPES if device.has_kernels else (*DTYPES, torch.float64)

    @seed(shard)
    @settings(max_examples=10 * TIMES)
    @given(blocked(dtypes))
    def holds(problem: Blocked) -> None:
        through_blocks.append(problem.block)
        test_attention.check(problem, device)
        test_backward.check(problem, device)

    holds()


@pytest.mark.parametrize("dropout_p", [0.3])
def test_dropout_is_that_of_a_dense_mask(device: Device, dropout_p: float) -> None:
    sizes = {"batch": 2, "key_heads": 2, "group": 2, "query_length": 200, "key_length": 150}
    usual = {"layouts": ("contiguous",) * 3, "window": (None, None), "is_causal": False, "scale": None}
    problem = Blocked(
        dtype=torch.float32, head_dim=16, value_dim=16, **sizes, **usual, density=0.8, alike=(False, True)
    )
    (query, key, value), terms = problem.arguments()
    query, key, value, mask = (tensor.to(device.type) for tensor in (query, key, value, terms["attn_mask"]))
    results = []
    for given_mask in ({"attn_mask": mask}, {"block_mask": block_mask_of(mask, (64, 32), device.type)}):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        torch.manual_seed(3)
        with device.active():
            out = mfa.attention(*leaves, dropout_p=dropout_p, enable_gqa=True, **given_mask)
            grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append((out, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def test_flex_attention_is_torchs(device: Device) -> None:
    query, key, value = (torch.randn(2, heads, 200, 16, device=device.type) for heads in (4, 2, 2))
    block_mask = create_block_mask(causal, None, None, 200, 200, device=device.type)
    options = {"block_mask": block_mask, "enable_gqa": True, "scale": 0.3, "return_lse": True}
    expected = torch_flex_attention(
        *(tensor.cpu() for tensor in (query, key, value)), **options | {"block_mask": block_mask.to("cpu")}
    )
    with device.active():
        found = mfa.flex_attention(query, key, value, **options)
        alone = mfa.flex_attention(query, key, value, **options | {"return_lse": False})
    torch.testing.assert_close(tuple(tensor.cpu() for tensor in found), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, found[0])


def test_errors() -> None:
    query, key, value = (torch.randn(2, 2, 200, 16) for _ in range(3))
    block_mask = create_block_mask(causal, None, None, 200, 200, device="cpu")
    with pytest.raises(NotImplementedError, match="score_mod is given"):
        mfa.flex_attention(query, key, value, lambda score, *_: score, block_mask)
    with pytest.raises(ValueError, match="attn_mask and block_mask are both given"):
        mfa.attention(query, key, value, torch.ones(200, 200, dtype=torch.bool), block_mask=block_mask)
    with pytest.raises(TypeError, match="block_mask is of type Tensor"):
        mfa.attention(query, key, value, block_mask=torch.ones(200, 200))
    for length, batch in ((199, 1), (200, 3)):
        wrong = create_block_mask(causal, batch, None, length, 200, device="cpu")
        with pytest.raises((ValueError, RuntimeError), match=r"block_mask .* \[B,Hq,Lq,Lk\] = \[2, 2, 200, 200\]"):
            mfa.attention(query, key, value, block_mask=wrong)


@pytest.mark.parametrize("is_packed", [pytest.param(False, marks=since_2_13), True])
def test_compiled_without_breaks(is_packed: bool) -> None:
    """Masks that nothing has seen before, one after the other through the same compiled function."""
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3))

    def function(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        return mfa.flex_attention(query, key, value, block_mask=block_mask).sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for mask in (mfa.masks.causal(), mfa.masks.prefix(5), mfa.masks.prefix(100)):
        block_mask: Any = create_block_mask(mask, None, None, 200, 200, device="cpu")
        if is_packed:
            block_mask = mfa.pack_block_mask(block_mask)
        found = compiled(query, key, value, block_mask)
        expected = function(query, key, value, block_mask)
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(out.sum(), (query, key, value)) for out in (found, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif(torch.__version__ >= (2, 13), reason="torch compiles it")
def test_compiling_a_block_mask_says_what_to_give() -> None:
    torch._dynamo.reset()
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    block_mask = create_block_mask(causal, None, None, 40, 40, device="cpu")
    compiled = torch.compile(mfa.flex_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"mfa\.pack_block_mask"):
        compiled(query, key, value, block_mask=block_mask)


def counted(query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> Any:
    with mfa.simulate() as sim:
        mfa.attention(query, key, value, **terms)
    return sim.counters


@pytest.mark.simulator
def test_hidden_blocks_cost_nothing() -> None:
    """Of a third of the blocks, a third of the products."""
    length = 768

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx // 128 + kv_idx // 128) % 3 == 0

    query, key, value = (torch.randn(1, 1, length, 64, dtype=torch.float16) for _ in range(3))
    whole = counted(query, key, value)
    found = counted(query, key, value, block_mask=create_block_mask(mask, None, None, length, length, device="cpu"))
    assert found.mma == whole.mma // 3
    # Besides, each of 6 tiles reads its list: the header, and 16 words of each of its two entries.
    lists = 6 * 256 * (16 + 2 + 2 * 16) * 4
    assert found.device_read_bytes <= whole.device_read_bytes / 3 + query.nbytes + lists


@pytest.mark.simulator
def test_a_window_as_block_mask_costs_what_the_window_costs() -> None:
    length = 1024

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 256)

    query, key, value = (torch.randn(1, 1, length, 64, dtype=torch.float16) for _ in range(3))
    own = counted(query, key, value, window=(255, 0))
    found = counted(query, key, value, block_mask=create_block_mask(window, None, None, length, length, device="cpu"))
    assert found.mma <= 1.05 * own.mma


@pytest.mark.simulator
def test_contents_that_no_mask_has_read_nothing_else() -> None:
    """The data of a mask is not trusted: whatever it holds, no kernel leaves the tensors, and each ends."""
    query, key, value = (torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(3))
    packed = mfa.pack_block_mask(create_block_mask(causal, None, None, 150, 150, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        data = packed.data.clone()
        where = torch.randint(16, len(data), (12,), generator=generator)
        data[where] = torch.randint(-(2**31), 2**31, (12,), generator=generator, dtype=torch.int64).to(torch.int32)
        wrong = mfa.PackedBlockMask(data, packed.shape)
        with mfa.simulate(checks=("bounds",)):
            out = mfa.attention(query, key, value, block_mask=wrong)
            torch.autograd.grad(out.sum(), (query, key, value))


def test_nothing_of_the_lengths_product_is_made() -> None:
    """At 16384 tokens: the largest tensor that any op makes is far from Lq x Lk bytes."""
    length = 16384
    block_mask = create_block_mask(causal, None, None, length, length, device="cpu")
    for make in (lambda: mfa.pack_block_mask(block_mask), lambda: mfa.PackedBlockMask.of(causal, block_mask.shape)):
        with Largest() as made:
            packed = make()
        assert made.nbytes <= 8 * 128 * length <= length * length // 16
        assert packed.data.numel() * 32 < length * length // 16
