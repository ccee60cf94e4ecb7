"""A small language model generates the same through the cache as PyTorch does without one."""

import math
from typing import Any

import pytest
import torch
from conftest import Device
from serving import moved, normal
from torch import Tensor

import mfa


class TinyModel:
    """Two layers of grouped attention over a small vocabulary, with random weights and learned positions."""

    layers, heads, key_heads, dim, vocabulary = 2, 4, 2, 16, 61

    def __init__(self) -> None:
        width = self.heads * self.dim
        self.embedding, self.positions = normal(self.vocabulary, width, seed=1), normal(128, width, seed=2)
        sizes = (width, self.key_heads * self.dim, self.key_heads * self.dim, width)
        self.projections = [
            [normal(width, size, seed=10 * layer + i) / math.sqrt(width) for i, size in enumerate(sizes)]
            for layer in range(1, 1 + self.layers)
        ]

    def run(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """Logits [B,L,vocabulary]; attend(layer, q, k, v) takes and returns [B,H,L,D]."""
        hidden = self.embedding[tokens] + self.positions[positions]
        for layer, (*qkv, out) in enumerate(self.projections):
            normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
            heads = ((normed @ w).unflatten(-1, (-1, self.dim)).transpose(1, 2) for w in qkv)
            hidden = hidden + attend(layer, *heads).transpose(1, 2).flatten(2) @ out
        return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]) @ self.embedding.T


def eager(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    """Everything computed anew for each token, by PyTorch."""

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, is_causal=True, enable_gqa=True)

    tokens = list(prompt)
    for _ in range(count):
        logits = model.run(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("page", [None, 8])
def test_generated_tokens_equal_eagers(device: Device, page: int | None) -> None:
    """64 tokens of a batch of 4 prompts of different lengths: one padded prefill, then a token at a time."""
    model, count, lengths = TinyModel(), 64, (3, 14, 1, 9)
    prompts = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    table, shape = None, (4, model.key_heads, 80, model.dim)
    if page is not None:
        table = (
            torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(4, 10).to(device.type)
        )
        shape = (40, model.key_heads, page, model.dim)
    caches = [[torch.full(shape, math.nan, device=device.type) for _ in range(2)] for _ in range(model.layers)]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = [moved(x, device) for x in (query, key, value)]
        with device.active():
            out = mfa.attention_with_kv_cache(
                tensors[0], *caches[layer], *tensors[1:], cache_seqlens=moved(seqlens, device), block_table=table
            )
        return out.cpu()

    # Padding at the right: what it leaves in the caches is overwritten before it counts.
    seqlens = torch.zeros(4, dtype=torch.int32)
    longest = max(lengths)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    logits = model.run(padded, torch.arange(longest).expand(4, -1), attend)
    tokens = logits[torch.arange(4), torch.tensor(lengths) - 1].argmax(-1, keepdim=True)
    generated = [tokens]
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    for _ in range(count - 1):
        tokens = model.run(tokens, seqlens[:, None], attend)[:, -1].argmax(-1, keepdim=True)
        generated.append(tokens)
        seqlens = seqlens + 1
    expected = [eager(model, prompt, count) for prompt in prompts]
    assert torch.cat(generated, dim=1).tolist() == expected
    assert len({tuple(line) for line in expected}) == 4  # different prompts say different things


# -- models of transformers -----------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


def tiny(name: str) -> Any:
    """A model of transformers with eager attention and random weights."""
    transformers = pytest.importorskip("transformers", reason="it needs Python 3.11")
    from mfa.transformers import register

    register()
    options = {"sliding_window": 32} if name != "Llama" else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**SIZES, **heads, **options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def check_generates_by_decode_kernels(model: Any, tokens: Tensor, least: int, **terms: Any) -> None:
    """The tokens of eager attention; after prefill, at least so many launches per layer, every one of decode's."""
    terms |= {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(tokens, **terms)
    model.set_attn_implementation("mfa")
    with mfa.simulate("apple9") as sim:
        found = model.generate(tokens, **terms)
    assert torch.equal(found, expected)
    steps = [launch.kernel.split("_")[0] for launch in sim.launches]
    layers = model.config.num_hidden_layers
    assert steps.count("forward") == layers  # prefill
    generated = steps[len(steps) - steps[::-1].index("forward") :]
    assert len(generated) >= least * layers
    assert set(generated) <= {"decode", "combine"}


@pytest.mark.simulator
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_transformers_generates_by_decode_kernels(name: str, cache: str) -> None:
    """Two prompts of different lengths, padded at the left."""
    model, tokens = tiny(name), torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    terms = {"cache_implementation": cache} if cache == "static" else {}
    check_generates_by_decode_kernels(model, tokens, 3, attention_mask=mask, max_new_tokens=4, **terms)


@pytest.mark.simulator
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_assisted_generation(name: str) -> None:
    """Tokens that were guessed from the prompt are verified together, as few queries."""
    model = tiny(name)
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    check_generates_by_decode_kernels(
        model, tokens, 2, attention_mask=torch.ones_like(tokens), max_new_tokens=8, prompt_lookup_num_tokens=4
    )


@pytest.mark.simulator
def test_assistant_model() -> None:
    """A smaller model drafts. Both have a prefill."""
    model, assistant = tiny("Llama"), tiny("Mistral")
    tokens = torch.randint(3, 60, (1, 80), generator=torch.Generator().manual_seed(1))
    terms = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, eos_token_id=None, **terms)
    for one in (model, assistant):
        one.set_attn_implementation("mfa")
    with mfa.simulate("apple9") as sim:
        found = model.generate(tokens, eos_token_id=None, assistant_model=assistant, **terms)
    assert torch.equal(found, expected)
    steps = [launch.kernel.split("_")[0] for launch in sim.launches]
    assert steps.count("forward") == 2 * model.config.num_hidden_layers
    assert steps.count("decode") >= 8


@pytest.mark.simulator
@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_quantized_caches_of_transformers(backend: str) -> None:
    """They give attention what they have dequantized."""
    if backend == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto isn't installed")
    config: dict[str, Any] = {"backend": backend}
    config |= {"nbits": 4, "residual_length": 8} if backend == "quanto" else {}
    tokens = torch.randint(3, 60, (2, 80), generator=torch.Generator().manual_seed(2))
    terms = {"attention_mask": torch.ones_like(tokens), "cache_implementation": "quantized", "cache_config": config}
    check_generates_by_decode_kernels(tiny("Llama"), tokens, 3, max_new_tokens=6, **terms)
