"""mfa.transformers: tiny random models of transformers, against its own eager attention."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing import assert_close

hf = pytest.importorskip("transformers", reason="transformers isn't installed")

from transformers import masking_utils  # noqa: E402 (after the skip)

import mfa.transformers  # noqa: E402
from mfa.transformers import _mask  # noqa: E402

mfa.transformers.register()

WINDOW = 5
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaConfig(**SIZES, **HEADS, **TOKENS),
    "Mistral": lambda: hf.MistralConfig(**SIZES, **HEADS, **TOKENS, sliding_window=WINDOW),
    "Gemma2": lambda: hf.Gemma2Config(
        **SIZES, **HEADS, **TOKENS, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0
    ),
    "GptOss": lambda: hf.GptOssConfig(
        **SIZES, **HEADS, **TOKENS, head_dim=16, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    ),
    "Qwen3": lambda: hf.Qwen3Config(**SIZES, **HEADS, **TOKENS, head_dim=16),
    "Bert": lambda: hf.BertConfig(**SIZES, num_attention_heads=4),
    "ModernBert": lambda: hf.ModernBertConfig(
        **SIZES, num_attention_heads=4, local_attention=2 * WINDOW, global_attn_every_n_layers=2, pad_token_id=0
    ),
    "ViT": lambda: hf.ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    ),
    "T5": lambda: hf.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}
CLASSES = {"Bert": "BertForMaskedLM", "ModernBert": "ModernBertForMaskedLM", "ViT": "ViTForImageClassification"}
CLASSES |= {"T5": "T5ForConditionalGeneration"}
DECODERS = ("Llama", "Mistral", "Gemma2", "GptOss", "Qwen3")


def models(name: str, *attentions: str) -> tuple[Any, ...]:
    """The same model, with different attentions."""
    torch.manual_seed(0)
    model = getattr(hf, CLASSES.get(name, f"{name}ForCausalLM"))
    made = [model._from_config(CONFIGS[name](), attn_implementation=attention).eval() for attention in attentions]
    with torch.no_grad():  # random weights are small: let attention matter
        for parameter_name, parameter in made[0].named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "query", "key", "Wqkv")):
                parameter.mul_(10)
            if "sinks" in parameter_name or "relative_attention_bias" in parameter_name:
                parameter.normal_()
    for other in made[1:]:
        other.load_state_dict(made[0].state_dict())
    return tuple(made)


def pair(name: str) -> tuple[Any, Any]:
    """With transformers' own attention, and with ours."""
    reference, ours = models(name, "eager", "mfa")
    return reference, ours


def tokens(padding: str) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask [2,11]; the second row is padded."""
    ids = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        rows = slice(0, 4) if padding == "left" else slice(-4, None)
        mask[1, rows], ids[1, rows] = 0, 0
    return ids, mask


def arguments(model: Any, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """Of a forward pass; and which of the results count."""
    if model.main_input_name == "pixel_values":
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": images}, torch.ones(2)
    ids, mask = tokens(padding)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(0)[:, :7]}, torch.ones(2, 7)
    return {"input_ids": ids, "attention_mask": mask}, mask


def logits(model: Any, padding: str = "none", run: Callable[..., Any] | None = None) -> Tensor:
    """Those that count."""
    inputs, counts = arguments(model, padding)
    result: Tensor = (model if run is None else run)(**inputs).logits
    return result[counts.bool()]


# Images have no padding.
PADDED = [(name, padding) for name in CONFIGS for padding in ("none", "left", "right")[: 1 if name == "ViT" else 3]]


@pytest.mark.parametrize(("name", "padding"), PADDED)
@torch.no_grad()
def test_logits(name: str, padding: str) -> None:
    reference, ours = pair(name)
    assert_close(logits(ours, padding), logits(reference, padding))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_step(name: str) -> None:
    losses, later, gradients = [], [], []
    for model in pair(name):
        inputs, _ = arguments(model, "right")
        labels = inputs.get("decoder_input_ids", inputs.get("input_ids", torch.tensor([0, 1])))
        labels = labels if name == "ViT" else labels.masked_fill(labels == 0, -100)
        losses.append(model(**inputs, labels=labels).loss)
        losses[-1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        later.append(model(**inputs, labels=labels).loss)
    assert_close(losses[1], losses[0])
    assert_close(later[1], later[0])
    assert not torch.equal(losses[1], later[1])
    for reference, ours in zip(*gradients, strict=True):
        if reference is None:
            assert ours is None
        else:
            assert_close(ours, reference)


def generate(model: Any, **options: Any) -> Any:
    """Greedily, behind a prompt that is longer than the sliding windows and padded at its left."""
    ids, mask = tokens("left")
    terms = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, attention_mask=mask, **terms, **options)


def check_generated(ours: Any, reference: Any) -> None:
    assert torch.equal(ours.sequences, reference.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(reference.logits))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "T5"])
def test_generate(name: str, cache: str) -> None:
    reference, ours = (generate(model, max_new_tokens=8, cache_implementation=cache) for model in pair(name))
    check_generated(ours, reference)
    if name != "T5":
        layers = [type(layer).__name__ for layer in ours.past_key_values.layers]
        sliding = {"Mistral": 2, "Gemma2": 1, "GptOss": 1}.get(name, 0)
        assert sorted(layers) == sorted(
            [f"{cache.title()}SlidingWindowLayer"] * sliding + [f"{cache.title()}Layer"] * (2 - sliding)
        )


@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_generate_compiled(name: str) -> None:
    """Each token by one compiled graph over a static cache, as transformers does it on GPUs."""
    torch._dynamo.reset()
    reference, ours = pair(name)
    options = {"max_new_tokens": 6, "cache_implementation": "static"}
    expected = generate(reference, **options)
    compiling = hf.CompileConfig(backend="aot_eager", fullgraph=True)
    compiling._compile_all_devices = True  # it would leave out CPUs
    counters.clear()
    check_generated(generate(ours, compile_config=compiling, **options), expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # the sliding cache's second graph is that of a full window


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@torch.no_grad()
def test_prompt_in_parts(name: str) -> None:
    """Queries behind a cache: the diagonal starts in neither corner of the matrix."""
    reference, ours = pair(name)
    ids, _ = tokens("none")
    cache = hf.DynamicCache(config=ours.config)
    parts = [ours(part, cache=cache).logits for part in ids.split([4, 3, 3, 1], 1)]
    assert_close(torch.cat(parts, 1), reference(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled(name: str) -> None:
    """Logits and gradients of the whole model as one graph, for each padding."""
    torch._dynamo.reset()
    reference, ours = pair(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    if name == "T5":  # it makes a cache within forward, which torch 2.10 can't trace
        compiled = partial(compiled, use_cache=False)
    for padding in [padding for model, padding in PADDED if model == name]:
        actual, expected = logits(ours, padding, compiled), logits(reference, padding)
        assert_close(actual, expected)
        grads, exact = (
            torch.autograd.grad(result.square().mean(), list(model.parameters()), allow_unused=True)
            for model, result in ((ours, actual), (reference, expected))
        )
        assert_close(grads, exact)


@torch.no_grad()
def test_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As regional compilation does it: the mask is made outside of what is compiled, and no matrix for that."""
    monkeypatch.setattr(mfa.transformers.Mask, "matrix", None)
    reference, ours = pair("Mistral")
    for layer in ours.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for padding in ("left", "right", "none", "left"):
        assert_close(logits(ours, padding), logits(reference, padding))


@torch.no_grad()
def test_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding and sliding windows go to the kernels as they are."""
    reference, ours = pair("Mistral")
    expected = logits(reference, "left")
    monkeypatch.setattr(mfa.transformers.Mask, "matrix", None)
    monkeypatch.setattr(masking_utils, "sdpa_mask", None)
    assert_close(logits(ours, "left"), expected)


MASKS = {
    "causal": lambda window: masking_utils.causal_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function,
    "bidirectional": lambda window: masking_utils.bidirectional_mask_function,
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function,
    "chunked": lambda window: masking_utils.chunked_causal_mask_function(window, torch.zeros(2, dtype=torch.int64)),
    "custom": lambda window: masking_utils.and_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: (k + b) % window != 1
    ),
}


@settings(max_examples=200)
@given(
    kind=st.sampled_from(sorted(MASKS)),
    window=st.integers(1, 9),
    lengths=st.tuples(st.integers(1, 7), st.integers(1, 12)),
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 5)),
    padding=st.none() | st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=2),
    skip=st.booleans(),
    as_tensor=st.booleans(),
    is_long=st.booleans(),
)
def test_mask_is_that_of_transformers(
    kind: str,
    window: int,
    lengths: tuple[int, int],
    offsets: tuple[int, int],
    padding: list[tuple[int, int]] | None,
    skip: bool,
    as_tensor: bool,
    is_long: bool,
) -> None:
    length = offsets[1] + lengths[1]
    rows = [[left <= key < length - right for key in range(length)] for left, right in padding or ()]
    terms = {
        "batch_size": 2,
        "q_length": lengths[0],
        "kv_length": lengths[1],
        "q_offset": torch.tensor(offsets[0]) if as_tensor else offsets[0],
        "kv_offset": offsets[1],
        "mask_function": MASKS[kind](window),
        "attention_mask": torch.tensor(rows) if rows else None,
        "allow_is_bidirectional_skip": skip and "bidirectional" in kind,
    }
    expected = masking_utils.sdpa_mask(**terms | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mask, "LONG", 1 if is_long else 100)
        mask = mfa.transformers.mask(**terms, allow_is_causal_skip=False)
    if is_long and lengths[0] > 1:
        assert isinstance(mask, mfa.transformers.Mask)
    if mask is None:
        assert expected.all()
        return
    assert (mask.shape, mask.dtype, mask.dim(), mask.size(-1)) == (expected.shape, torch.bool, 4, lengths[1])
    if isinstance(mask, mfa.transformers.Mask):
        queries, keys = torch.zeros(2, 1, lengths[0], 8), torch.zeros(2, 1, lengths[1], 8)
        values = torch.eye(lengths[1])[None, None].expand(2, -1, -1, -1)
        out, _ = mfa.transformers.attention(torch.nn.Module(), queries, keys, values, mask)
        assert torch.equal(out.transpose(1, 2) > 0, expected)
        assert mask._matrix is None
    for changed in (mask & True, mask.clone(), ~~mask, torch.cat([mask])):
        assert type(changed) is Tensor
        assert torch.equal(changed, expected)
    assert torch.equal(mask[:, :, -1:], expected[:, :, -1:])


def layer(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("length_q", [1, 4])
def test_without_a_mask(length_q: int) -> None:
    """As transformers' sdpa: causal in the upper left, unless there is one query."""
    sdpa = hf.AttentionInterface()["sdpa"]
    query, key, value = torch.randn(2, 4, length_q, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    for module in (layer(num_key_value_groups=2, is_causal=True), layer(num_key_value_groups=2, is_causal=False)):
        for terms in ({}, {"is_causal": False}, {"scaling": 0.3}):
            ours, probabilities = mfa.transformers.attention(module, query, key, value, None, **terms)
            assert probabilities is None
            assert ours.is_contiguous()
            assert_close(ours, sdpa(module, query, key, value, None, **terms)[0])


@pytest.mark.parametrize("kind", ["none", "bool", "float", "mask", "blocks"])
def test_position_bias(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mask, "LONG", 2)
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    seen = torch.rand(2, 1, 6, 6) > 0.4
    seen[..., 0] = True
    masks = {"none": None, "bool": seen, "float": torch.randn(2, 1, 6, 6)}
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    terms = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    masks["mask"] = mfa.transformers.mask(**terms, attention_mask=padding)
    masks["blocks"] = mfa.transformers.mask(**terms, mask_function=MASKS["chunked"](4))
    sdpa = hf.AttentionInterface()["sdpa"]
    results = []
    for function in (mfa.transformers.attention, sdpa):
        out, _ = function(layer(is_causal=True), query, key, value, masks[kind], position_bias=bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), bias)))
    assert_close(*results)


def test_dropout() -> None:
    query, key, value = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16), torch.randn(2, 2, 6, 16)
    torch.manual_seed(0)
    expected = mfa.attention(query, key, value, None, 0.5, True, enable_gqa=True).transpose(1, 2)
    torch.manual_seed(0)
    assert_close(mfa.transformers.attention(layer(), query, key, value, None, dropout=0.5)[0], expected)


@torch.no_grad()
def test_packed() -> None:
    """Sequences in one row, told by position_ids, by cu_seq_lens, or by both."""
    ids = tokens("none")[0][:1]
    for name in ("Llama", "Mistral", "GptOss"):
        reference, ours = pair(name)
        expected = torch.cat([reference(part).logits for part in ids.split([7, 4], 1)], 1)
        positions = torch.cat([torch.arange(7), torch.arange(4)])[None]
        starts = torch.tensor([0, 7, 11], dtype=torch.int32)
        lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
        for terms in ({}, lengths) if name != "GptOss" else (lengths,):  # GptOss makes its mask without position_ids
            assert_close(ours(ids, position_ids=positions, use_cache=False, **terms).logits, expected)


@pytest.mark.parametrize("name", ["sinks", "head_mask", "block_table", "k_cache", "v_cache"])
def test_refuses_by_name(name: str) -> None:
    query = torch.randn(1, 1, 2, 8)
    with pytest.raises(NotImplementedError, match=name):
        mfa.transformers.attention(layer(), query, query, query, None, **{name: True})


def test_refuses_models_that_attend_by_themselves() -> None:
    """Bloom adds its mask to the scores, whatever attention is asked for: a bool mask would be 1 there."""
    config = hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    model = hf.BloomModel._from_config(config, attn_implementation="mfa")
    with pytest.raises(NotImplementedError, match="BloomModel"):
        model(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["my_sdpa", "flash_mfa", "eager", "a/b", ""])
def test_refuses_names(name: str) -> None:
    with pytest.raises(ValueError, match="name is"):
        mfa.transformers.register(name)


@torch.no_grad()
def test_another_name_and_back() -> None:
    mfa.transformers.register("metal")
    model, _ = pair("Llama")
    expected = logits(model)
    for name in ("metal", "mfa", "eager"):
        model.set_attn_implementation(name)
        assert_close(logits(model), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels(name: str, device: Device) -> None:
    """A whole model whose attention is the Metal kernels: logits, gradients, and a token more."""
    results = []
    for model, active in zip(pair(name), (nullcontext(), device.active()), strict=True):
        inputs, counts = arguments(model, "left")
        moved = model.to(device.type if model.config._attn_implementation == "mfa" else "cpu")
        inputs = {name: tensor.to(moved.device) for name, tensor in inputs.items()}
        with active:
            result = moved(**inputs).logits[counts.bool()]
            result.square().mean().backward()
            with torch.no_grad():
                generates = name in (*DECODERS, "T5")
                tokens = moved.generate(**inputs, max_new_tokens=2, do_sample=False).cpu() if generates else None
        gradients = {name: p.grad.cpu() for name, p in moved.named_parameters() if p.grad is not None}
        results.append({"logits": result.detach().cpu(), "tokens": tokens, **gradients})
    assert_close(results[1], results[0])
