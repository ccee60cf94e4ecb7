"""What other packages do with attention, run on mfa: each function is a case of test_clients.py, in its own process."""

import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfa import sdpa

RELATIVE = 1e-4  # of the largest number, for models in float32

TIMM: dict[str, tuple[int, dict[str, Any]]] = {  # an image's size, and what makes the model small
    "beit_base_patch16_224": (32, {"img_size": 32, "embed_dim": 64, "num_heads": 4, "depth": 2}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 2}),
    "davit_tiny": (64, {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 2)}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 2}),
    "maxvit_tiny_rw_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "samvit_base_patch16": (64, {"img_size": 64, "embed_dim": 64, "num_heads": 4, "depth": 2}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}),
    "twins_svt_small": (64, {}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
}


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=RELATIVE * float(wanted.abs().max()))


def counted(module: Any) -> list[None]:
    """Grows by an element for each call of a module's `attention`."""
    calls: list[None] = []
    original: Callable[..., Any] = module.attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    module.attention = attention
    return calls


def step(model: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients, behind each other."""
    model.zero_grad()
    out = model(x)
    out.sin().sum().backward()
    return [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def timm() -> None:
    """Attention models of timm through F.scaled_dot_product_attention, against torch's math."""
    # The fake kernels of torchvision's C++ ops, which PyPI's build for Linux can't load beside a torch without CUDA.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
    import timm as package  # type: ignore[import-not-found,unused-ignore]

    package.layers.set_fused_attn(True, experimental=True)
    calls = counted(sdpa)
    for name, (size, sizes) in TIMM.items():
        torch.manual_seed(0)
        model = package.create_model(name, **sizes).eval()
        x = torch.randn(2, 3, size, size)
        with sdpa_kernel(SDPBackend.MATH):
            expected = step(model, x)
        calls.clear()
        with sdpa.enabled(cpu=True):
            check_close(step(model, x), expected)
        assert calls, f"{name} calls no attention"


def llama(implementation: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, **sizes)
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)  # at which attention matters
    return model


def peft() -> None:
    """A step of LoRA: loss and gradients of the adapters, with padding."""
    import peft as package  # type: ignore[import-not-found,unused-ignore]

    import mfa.transformers

    mfa.transformers.register()
    tokens = torch.randint(3, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(tokens)
    padding[1, :4] = 0
    labels = tokens.masked_fill(padding.roll(1, 1) * padding == 0, -100)  # what padding predicts has no sense
    results = []
    for implementation in ("eager", "mfa"):
        model = package.get_peft_model(
            llama(implementation), package.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        out = model(input_ids=tokens, attention_mask=padding, labels=labels)
        out.loss.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(trained) == 8  # A and B of two projections in two layers
        results.append([out.loss.detach(), *trained])
    check_close(results[1], results[0])


def trl() -> None:
    """Three steps of supervised fine-tuning of LoRA's adapters, with packed sequences."""
    import datasets  # type: ignore[import-not-found,unused-ignore]
    import peft as adapters  # type: ignore[import-not-found,unused-ignore]
    import transformers as hf
    import trl as package  # type: ignore[import-not-found,unused-ignore]
    from tokenizers import Tokenizer, models

    import mfa.transformers

    calls = counted(mfa.transformers)
    mfa.transformers.register()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (16,), generator=generator).tolist()
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2")
    results = []
    for implementation in ("eager", "mfa"):
        with tempfile.TemporaryDirectory() as folder:
            options = {"output_dir": folder, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False}
            options |= {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "disable_tqdm": True}
            trainer = package.SFTTrainer(
                model=llama(implementation),
                args=package.SFTConfig(packing=True, max_length=40, **options),
                train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
                processing_class=tokenizer,
                peft_config=adapters.LoraConfig(target_modules=["q_proj", "v_proj"]),
            )
            trainer.train()
        results.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert calls
    assert len(results[0]) == 8
    check_close(results[1], results[0])
