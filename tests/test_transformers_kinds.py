"""mfa.transformers where models differ: what they do with a mask, what else limits a query, who never asks."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from largest import Largest
from torch import Tensor, nn
from torch.testing import assert_close

hf = pytest.importorskip("transformers", reason="transformers isn't installed")

from transformers import masking_utils  # noqa: E402 (after the skip)
from transformers_models import arguments, make, paddings, results  # noqa: E402

import mfa.transformers  # noqa: E402
from mfa import _log  # noqa: E402
from mfa.transformers import _mask  # noqa: E402

mfa.transformers.register()
SDPA = hf.AttentionInterface()["sdpa"]
# Of whole models; compiling one takes long.
WAYS = pytest.mark.parametrize(
    "compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.slow)]
)
RELATIVE = 1e-4  # of the largest number, for models in float32


def ours(reference: Any, compiled: bool) -> Any:
    model = copy.deepcopy(reference)
    model.set_attn_implementation("mfa")
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    return model


def check_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, rtol=0, atol=RELATIVE * float(b.abs().max()))


# The first three add the mask to their scores, the last leaves out that it isn't causal.
@WAYS
@pytest.mark.parametrize("name", ["deepseek_v4", "git", "bridgetower", "splinter"])
@torch.no_grad()
def test_models_that_know_eager_attention_only(name: str, compiled: bool) -> None:
    reference = make(name)
    model = ours(reference, compiled)
    for mask in (None, *(mask for _, mask in paddings())):
        check_close(results(model, mask), results(reference, mask))


# They add the mask to their scores too, in attention that asks nobody.
@pytest.mark.parametrize("name", ["blip", "flava", "groupvit", "trocr"])
@torch.no_grad()
def test_models_with_attention_of_their_own(name: str) -> None:
    """Refused if built with ours; as they were if switched to it, which transformers doesn't do."""
    reference = make(name)
    config = copy.deepcopy(reference.config)
    built, switched = type(reference)._from_config(config, attn_implementation="mfa"), ours(reference, compiled=False)
    sentence = r"'mfa' is not supported by \w+, which doesn't use transformers' attention interface: use 'eager'"
    for _, mask in paddings():
        with pytest.raises(NotImplementedError, match=sentence):
            results(built.eval(), mask)
        check_close(results(switched, mask), results(reference, mask))


EAGER_ONLY = {"config": hf.SplinterConfig(), "dtype": torch.float32}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("length_q", [1, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_of_such_a_model_is_eagers(compiled: bool, length_q: int, causal: bool, padded: bool) -> None:
    """In all that can be done with it: never None, never bool."""
    torch._dynamo.reset()
    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    terms = {"batch_size": 2, "q_length": length_q, "kv_length": 5, "q_offset": 5 - length_q, **EAGER_ONLY}
    terms |= {"allow_is_bidirectional_skip": not causal, "allow_is_causal_skip": causal, "mask_function": function}
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool() if padded else None
    expected = masking_utils.eager_mask(**terms | {"allow_is_bidirectional_skip": False}, attention_mask=padding)

    def added(padding: Tensor | None) -> Tensor:
        mask = mfa.transformers.mask(**terms, attention_mask=padding)
        assert mask is not None
        assert mask.dtype == torch.float32
        return mask + 0

    run = torch.compile(added, backend="aot_eager", fullgraph=True) if compiled else added
    assert torch.equal(run(padding).expand_as(expected), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_mask_is_what_it_is_to_eager_attention(compiled: bool) -> None:
    """A layer of a model that knows eager attention only isn't causal by being silent about it."""
    torch._dynamo.reset()
    layer = nn.Module()
    layer.config = hf.SplinterConfig()
    query, key, value = torch.randn(3, 2, 4, 6, 16)

    def run(query: Tensor) -> Tensor:
        return mfa.transformers.attention(layer, query, key, value, None)[0]

    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    assert_close(run(query), SDPA(layer, query, key, value, None, is_causal=False)[0])


class OwnConfig(hf.PreTrainedConfig):
    model_type = "own"
    hidden_size: int = 16


class OwnAttention(nn.Module):
    """Which asks nobody. Here is no class that asks, as transformers sees by the file's text."""


class OwnModel(hf.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attention = OwnAttention()

    def forward(self, hidden: Tensor) -> Any:
        return masking_utils.create_causal_mask(self.config, hidden, None, None)


def test_refuses_models_that_no_mapping_lists() -> None:
    with pytest.raises(NotImplementedError, match="OwnModel"):
        OwnModel._from_config(OwnConfig(), attn_implementation="mfa")(torch.zeros(1, 4, 16))


TABLES = [("falcon", "FALCON"), ("sam_vision_model", "SAM_VISION"), ("git", "GIT_SELF")]


@pytest.mark.parametrize(("name", "table"), TABLES)
def test_a_table_without_our_name_is_a_sentence(name: str, table: str) -> None:
    reference = make(name)
    with pytest.raises(NotImplementedError, match=f"='mfa' is not supported .*{table}_ATTENTION_CLASSES.*'eager'"):
        type(reference)._from_config(reference.config, attn_implementation="mfa")


@pytest.mark.parametrize("name", ["openai-gpt", "xlm", "cpmant"])
@torch.no_grad()
def test_says_once_who_never_asks(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "said", set())
    monkeypatch.setattr(mfa.transformers._models, "_met", set())
    reference = make(name)
    with caplog.at_level(logging.WARNING, logger="mfa"):
        models = [type(reference)._from_config(reference.config, attn_implementation="mfa").eval() for _ in range(2)]
    (message,) = caplog.messages
    assert message.startswith(type(reference).__name__)
    assert "'mfa' doesn't reach it" in message
    models[0].load_state_dict(reference.state_dict())
    check_close(results(models[0]), results(reference))


@torch.no_grad()
def test_output_attentions_is_let_through(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "said", set())
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    terms = {"output_attentions": True, "is_causal": False}
    with caplog.at_level(logging.WARNING, logger="mfa"):
        actual = [mfa.transformers.attention(nn.Module(), query, key, value, None, **terms)[0] for _ in range(2)]
    (message,) = caplog.messages
    assert "output_attentions" in message
    assert_close(actual[0], SDPA(nn.Module(), query, key, value, None, **terms)[0])


STARTS = torch.tensor([0, 3, 8, 12])  # of two rows of 6


def same_sequence() -> Tensor:
    numbers = torch.tensor([0] * 3 + [1] * 5 + [2] * 4).view(2, 6)
    return (numbers[:, :, None] == numbers[:, None])[:, None]


def packed_terms(kind: str) -> dict[str, Any]:
    """Of a mask: plain, with padding, made from position_ids that begin anew within a sequence of STARTS, or blocks."""
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool() if kind == "padding" else None
    function = masking_utils.sliding_window_causal_mask_function(2)
    if kind == "blocks":
        function = masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int64))
    if kind == "positions":
        positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
        function = masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(function, positions),
            masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions)),
        )
    terms = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": function, "attention_mask": padding}
    return terms | {"allow_is_causal_skip": False}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("eager_only", [False, True])
@pytest.mark.parametrize("kind", ["plain", "padding", "positions", "blocks"])
def test_lengths_and_a_mask_both_count(
    compiled: bool, eager_only: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(_mask, "LONG", 2)
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    terms = packed_terms(kind)
    seen = masking_utils.sdpa_mask(**terms) & same_sequence()
    if eager_only:
        terms |= EAGER_ONLY
    lengths = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS.clone(), "max_length_q": 5, "max_length_k": 5}

    def run(query: Tensor) -> Tensor:
        mask = mfa.transformers.mask(**terms)
        return mfa.transformers.attention(nn.Module(), query, key, value, mask, **lengths)[0]

    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    counts = seen.any(-1)[:, 0]  # a row that sees nothing is 0 here, and the mean there
    expected = SDPA(nn.Module(), query, key, value, seen)[0]
    assert_close(run(query)[counts], expected[counts])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_lengths_and_a_mask_of_ones_own(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    seen = (torch.rand(2, 1, 6, 6) > 0.3) | torch.eye(6, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.where(seen, torch.randn(2, 1, 6, 6), -torch.inf)
    both = seen & same_sequence() if dtype == torch.bool else mask.masked_fill(~same_sequence(), -torch.inf)
    out = mfa.transformers.attention(nn.Module(), query, key, value, mask, cu_seq_lens_q=STARTS, cu_seq_lens_k=STARTS)[
        0
    ]
    assert_close(out, SDPA(nn.Module(), query, key, value, both)[0])


@pytest.mark.parametrize("lengths", [False, True])
def test_packed_rows_need_no_matrix(lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    terms = packed_terms("positions")
    seen = masking_utils.sdpa_mask(**terms)
    mask = mfa.transformers.mask(**terms)
    assert torch.equal(mask & True, seen)
    monkeypatch.setattr(mfa.transformers.Mask, "matrix", None)
    given = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS} if lengths else {}
    out = mfa.transformers.attention(nn.Module(), query, key, value, mask, **given)[0]
    both = seen & same_sequence() if lengths else seen
    assert_close(out, SDPA(nn.Module(), query, key, value, both)[0])


INDICES: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "indices": lambda keys: ({"indices": keys[:, 0]}, keys[:, :1, :, :, None] == torch.arange(11)),
    "block_indices": lambda keys: (
        {"block_indices": keys // 4},
        (keys[..., None] // 4 == torch.arange(11) // 4).repeat_interleave(2, 1),
    ),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_indices_are_a_mask(name: str, kind: str) -> None:
    """Of keys, or of blocks of four; what is below 0 is none."""
    query, (key, value) = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 4, 11, 16)
    layer = nn.Module()
    layer.indexer = nn.Module()
    layer.indexer.block_size = 4
    keys = torch.stack([torch.randperm(11) for _ in range(2 * 2 * 6)]).view(2, 2, 6, 11)[..., :4]
    keys[..., -1] = torch.where(torch.rand(2, 2, 6) < 0.5, -4, keys[..., -1])
    given, chosen = INDICES[name](keys)
    seen = chosen.any(-2).expand(2, 4, 6, 11)
    masks = {"none": None, "bool": torch.rand(2, 1, 6, 11) > 0.2, "float": torch.randn(2, 1, 6, 11)}
    visible = seen & masks["bool"] if kind == "bool" else seen
    expected = masks["float"].masked_fill(~seen, -torch.inf) if kind == "float" else visible
    out = mfa.transformers.attention(layer, query, key, value, masks[kind], is_causal=False, **given)[0]
    counts = visible.any(-1).transpose(1, 2)
    assert_close(out[counts], SDPA(layer, query, key, value, expected)[0][counts])


INDEXERS = ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4_text", "minimax_m3_vl_text"]


@WAYS
@pytest.mark.parametrize("name", INDEXERS)
@torch.no_grad()
def test_models_with_an_indexer(name: str, compiled: bool) -> None:
    reference = make(name)
    model = ours(reference, compiled)
    for mask in (None, *(mask for _, mask in paddings())):
        check_close(results(model, mask), results(reference, mask))


IMAGES = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled layers"])
@pytest.mark.parametrize(("name", "extra"), [("llama4_text", {}), ("gemma3", {"token_type_ids": IMAGES})])
def test_long_masks_that_are_no_windows_are_blocks(
    name: str, extra: dict[str, Tensor], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, and images whose tokens see each other: results and gradients, without a matrix."""
    torch._dynamo.reset()
    reference = make(name)
    model = ours(reference, compiled=False)
    for layer in [layer for layer in model.modules() if compiled and type(layer).__name__.endswith("DecoderLayer")]:
        layer.compile(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(_mask, "LONG", 2)
    monkeypatch.setattr(mfa.transformers.Mask, "matrix", None)
    expected = reference(**arguments(reference), **extra).logits
    for _, padding in paddings():
        found, known = (m(**arguments(m), attention_mask=padding, **extra).logits for m in (model, reference))
        check_close([found[padding.bool()]], [known[padding.bool()]])
        assert float((known - expected).abs().max()) > 0.1  # what is hidden counts
    for m in (model, reference):
        m(**arguments(m), **extra).logits.square().mean().backward()
    gradients = ([p.grad for p in m.parameters() if p.grad is not None] for m in (model, reference))
    check_close(*gradients)


def test_a_long_mask_makes_no_matrix() -> None:
    length = 4096
    function = masking_utils.chunked_causal_mask_function(1000, torch.zeros(1, dtype=torch.int64))
    padding = torch.arange(length)[None] >= 7
    terms = {"batch_size": 1, "q_length": length, "kv_length": length, "mask_function": function}
    with Largest() as made:
        mask = mfa.transformers.mask(**terms, attention_mask=padding)
    assert isinstance(mask, mfa.transformers.Mask)
    assert made.nbytes <= 8 * 128 * length <= length * length // 4
    assert torch.equal(mask & True, masking_utils.sdpa_mask(**terms, attention_mask=padding))
