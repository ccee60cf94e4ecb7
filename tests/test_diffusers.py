"""mfa.diffusers: tiny random models and pipelines of diffusers, against their own attention."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Device
from torch import Tensor
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
hf = pytest.importorskip("transformers", reason="transformers isn't installed")

import mfa.diffusers  # noqa: E402 (after the skips)
from mfa import _log  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries that mfa.attention has got."""
    queries: list[Tensor] = []
    original = mfa.diffusers.attention

    def spy(query: Tensor, *rest: Any) -> Tensor:
        queries.append(query)
        return original(query, *rest)

    monkeypatch.setattr(mfa.diffusers, "attention", spy)
    monkeypatch.setattr(_log, "said", set())
    return queries


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def dit() -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=1000, **sizes).eval()


def flux() -> Any:
    """Its layers and processors are of diffusers' newer kind, which goes through `dispatch_attention_fn`."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), **sizes
    ).eval()


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4).eval()


# As published but for the widths of the outer blocks and their number of layers: the attention is that of the whole
# model, one head of 512 over the pixels of a latent.
VAES: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159},
}


def image_vae(name: str) -> Any:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 32, 32, 512),
    }
    return diffusers.AutoencoderKL(**blocks, **VAES[name]).eval()


def wan() -> Any:
    """Its attention blocks have no processors."""
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    return diffusers.AutoencoderKLWan(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **sizes).eval()


def inputs(model: Any, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device=device)
        states = {"encoder_hidden_states": random(2, 7, 32), "encoder_attention_mask": mask}
        return {"sample": random(2, 4, 8, 8), "timestep": 10, **states}
    if kind == "DiTTransformer2DModel":
        labels = torch.tensor([1, 2], device=device)
        return {"hidden_states": random(2, 4, 8, 8), "timestep": labels, "class_labels": labels}
    if kind == "FluxTransformer2DModel":
        positions = {"txt_ids": torch.zeros(7, 3, device=device), "img_ids": random(16, 3)}
        states = {"encoder_hidden_states": random(2, 7, 32), "pooled_projections": random(2, 32)}
        return {"hidden_states": random(2, 16, 4), "timestep": torch.ones(2, device=device), **positions, **states}
    if kind == "AutoencoderKLWan":
        return {"sample": random(1, 3, 1, 8, 8)}
    return {"sample": random(1, 3, 8, 8)}


MODELS = {  # by class: the model, and how many attention layers it has
    "UNet2DConditionModel": (unet, 8),
    "DiTTransformer2DModel": (dit, 2),
    "FluxTransformer2DModel": (flux, 2),
    "AutoencoderKL": (vae, 2),
    "AutoencoderKLWan": (wan, 2),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_output_is_the_native_one(name: str, calls: list[Tensor]) -> None:
    make, layers = MODELS[name]
    model = make()
    expected = model(**inputs(model)).sample
    assert mfa.diffusers.enable(model) == layers
    assert mfa.diffusers.enable(model) == layers
    assert_close(model(**inputs(model)).sample, expected)
    assert len(calls) == layers
    assert _log.said == set()
    assert_close(copy.deepcopy(model)(**inputs(model)).sample, expected)
    assert len(calls) == 2 * layers

    mfa.diffusers.disable(model)
    assert torch.equal(model(**inputs(model)).sample, expected)
    assert len(calls) == 2 * layers


def test_gradients() -> None:
    reference, ours = dit(), dit()
    mfa.diffusers.enable(ours)
    for model in (reference, ours):
        model(**inputs(model)).sample.square().mean().backward()
    for expected, actual in zip(reference.parameters(), ours.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)


def test_other_models_keep_theirs(calls: list[Tensor]) -> None:
    enabled, other = dit(), dit()
    mfa.diffusers.enable(enabled)
    other(**inputs(other))
    assert calls == []
    assert type(enabled.transformer_blocks[0].attn1).__name__ == "Attention"
    assert isinstance(enabled.transformer_blocks[0].attn1, type(other.transformer_blocks[0].attn1))


@torch.no_grad()
def test_processors_may_change(calls: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    model = unet()
    mfa.diffusers.enable(model)
    expected = model(**inputs(model)).sample
    model.fuse_qkv_projections()
    assert_close(model(**inputs(model)).sample, expected)
    assert len(calls) == 16
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert_close(model(**inputs(model)).sample, expected)
    assert len(calls) == 16
    assert caplog.text.count("AttnProcessor keeps its attention") == 1


@torch.no_grad()
def test_what_mfa_refuses_goes_to_aten(calls: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer = diffusers.models.attention_processor.Attention(query_dim=16, heads=1, dim_head=520).eval()
    states = torch.randn(1, 5, 16)
    expected = layer(states)
    assert mfa.diffusers.enable(layer) == 1
    for _ in range(2):
        assert torch.equal(layer(states), expected)
    assert caplog.text.count("head dimension 520") == 1


@pytest.mark.parametrize("dim", [16, 264])
def test_arguments_arrive(dim: int) -> None:
    """At mfa, and at ATen, which takes what has more than 256 columns."""
    query, key, value = torch.randn(1, 4, 5, dim), torch.randn(1, 2, 5, dim), torch.randn(1, 2, 5, dim)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for terms in ({"is_causal": True}, {"attn_mask": torch.randn(5, 5), "scale": 0.03}):
        expected = sdpa(query, key, value, enable_gqa=True, **terms)
        with mfa.diffusers._Route() as route:
            assert_close(sdpa(query, key, value, enable_gqa=True, **terms), expected)
        assert route.used


@torch.no_grad()
def test_compiled() -> None:
    model = dit()
    expected = model(**inputs(model)).sample
    mfa.diffusers.enable(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    assert_close(torch.compile(model, backend=backend, fullgraph=True)(**inputs(model)).sample, expected)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum(target.startswith("mfa.attention_forward") for target in targets) == 2


def pipeline() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler())


def test_dit_pipeline(calls: list[Tensor]) -> None:
    images = []
    for enabled in (False, True):
        pipe = pipeline()
        pipe.set_progress_bar_config(disable=True)
        if enabled:
            assert mfa.diffusers.enable(pipe) == 4
        result = pipe([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
        images.append(torch.from_numpy(result.images))
    assert_close(images[1], images[0])
    assert len(calls) == 2 * 2 + 1  # two layers, two steps; the decoder


@torch.no_grad()
def test_text_encoder() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_encoder = hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=64, **sizes)).eval()
    pipe = diffusers.StableDiffusionPipeline(
        *(vae(), text_encoder, None, unet(), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None),
        requires_safety_checker=False,
    )
    ids = torch.arange(7)[None]
    expected = text_encoder(ids).last_hidden_state
    before = text_encoder.config._attn_implementation
    assert mfa.diffusers.enable(pipe) == 8 + 2 + 1
    assert text_encoder.config._attn_implementation == "mfa"
    assert_close(text_encoder(ids).last_hidden_state, expected)
    mfa.diffusers.disable(pipe)
    assert text_encoder.config._attn_implementation == before


def test_attention_of_its_own_is_logged_once(calls: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """A class by its name; parts of enabled layers, and what contains some, are left out."""

    class SomeAttention(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module | None = None) -> None:
            super().__init__()
            self.inner = inner

    class OwnAttnBlock(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    model = torch.nn.Sequential(SomeAttention(dit()), OwnAttnBlock(), OwnAttnBlock())
    for _ in range(2):
        assert mfa.diffusers.enable(model) == 2
    messages = [record.message for record in caplog.records]
    assert messages == ["OwnAttnBlock keeps its attention: it doesn't call F.scaled_dot_product_attention"]


@torch.no_grad()
def test_a_processor_without_the_usual_interface(calls: list[Tensor]) -> None:
    """As of Mochi: a layer holds one, and has no `set_processor`; a processor that is a module is no layer."""

    class Processor(torch.nn.Module):
        def __call__(self, layer: Any, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor = Processor()

        def forward(self, x: Tensor) -> Tensor:
            return self.processor(self, x)

    model = torch.nn.Sequential(Layer())
    assert mfa.diffusers.enable(model) == 1
    assert type(model[0].processor) is Processor
    model(torch.randn(1, 2, 5, 8))
    assert len(calls) == 1


def test_refuses_what_has_no_attention() -> None:
    with pytest.raises(TypeError, match="model is of type str"):
        mfa.diffusers.enable("unet")
    with pytest.raises(ValueError, match="model is a Linear without attention layers"):
        mfa.diffusers.enable(torch.nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_a_vae_of_images(name: str, calls: list[Tensor]) -> None:
    """Encodes 512 x 512 pixels, and decodes 64 x 64 latents."""
    model = image_vae(name)
    pixels, latents = torch.randn(1, 3, 512, 512), torch.randn(1, model.config.latent_channels, 64, 64)
    expected = model.encode(pixels).latent_dist.mean, model.decode(latents).sample
    assert mfa.diffusers.enable(model) == 2
    assert_close((model.encode(pixels).latent_dist.mean, model.decode(latents).sample), expected)
    assert [query.shape for query in calls] == [(1, 1, 64 * 64, 512)] * 2
    assert _log.said == set()


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_a_vae_of_images_on_kernels(name: str, device: Device) -> None:
    model = image_vae(name)
    latents = torch.randn(1, model.config.latent_channels, 9, 7)
    expected = model.decode(latents).sample
    model.to(device.type)
    mfa.diffusers.enable(model)
    with device.active():
        assert_close(model.decode(latents.to(device.type)).sample.cpu(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_kernels(name: str, device: Device, calls: list[Tensor]) -> None:
    """A whole model whose attention is the Metal kernels, forward and backward."""
    make, layers = MODELS[name]
    results = []
    for on, active in (("cpu", nullcontext()), (device.type, device.active())):
        model = make().to(on)
        if results:
            mfa.diffusers.enable(model)
        with active:
            sample = model(**inputs(model, on)).sample
            sample.square().mean().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"sample": sample.detach().cpu(), **gradients})
    assert len(calls) == layers
    assert _log.said == set()
    assert_close(results[1], results[0])
