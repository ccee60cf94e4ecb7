"""Other libraries' own flash-attn back ends on mfa.flash_attn: python tests/flash_backends.py transformers | diffusers.

In a process of its own, since both ask once whether there is a flash-attn.
"""

import copy
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import mfa.flash_attn


def transformers_back_end() -> None:
    import transformers
    from transformers import modeling_flash_attention_utils as used
    from transformers.utils import import_utils

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    config = transformers.MistralConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None, dtype=torch.bfloat16)

    def model(attention: str) -> Any:
        torch.manual_seed(0)
        cls = transformers.MistralForCausalLM
        return cls._from_config(copy.deepcopy(config), attn_implementation=attention).eval()

    # Package and version satisfy it: what is left is that it wants a CUDA device.
    assert import_utils.is_flash_attn_greater_or_equal("2.8.3")
    with pytest.raises(ImportError, match="FlashAttention2 is not available on CPU"):
        model("flash_attention_2")
    import_utils.is_flash_attn_2_available.cache_clear()
    with mock.patch.object(import_utils, "is_torch_cuda_available", return_value=True):
        flash = model("flash_attention_2")
    assert used._flash_fn is mfa.flash_attn.flash_attn_func
    assert used._flash_varlen_fn is mfa.flash_attn.flash_attn_varlen_func
    eager = model("eager")
    tokens = torch.randint(1, 64, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    for padding in (None, mask):
        results = []
        for made in (flash, eager):
            logits = made(tokens, attention_mask=padding).logits
            if padding is not None:
                logits = logits[mask.bool()]
            made.zero_grad()
            logits.float().logsumexp(-1).sum().backward()
            results.append((logits.detach(), made.model.layers[0].self_attn.q_proj.weight.grad.clone()))
        assert_close(results[0], results[1], rtol=0.05, atol=0.02)  # bfloat16 through two layers
    assert flash.generate(tokens, max_new_tokens=4).shape == (2, 16)


def diffusers_back_end() -> None:
    import diffusers
    from diffusers.models import attention_dispatch

    assert attention_dispatch.flash_attn_func is mfa.flash_attn.flash_attn_func
    low_level = mfa.flash_attn.flash_attn_interface
    assert attention_dispatch._wrapped_flash_attn_forward is low_level._flash_attn_forward
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    native = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), **sizes
    ).bfloat16()
    given = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.1, 0.7]),
    }
    inputs = {name: x.bfloat16() for name, x in given.items()}
    inputs |= {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3)}

    def results(model: Any) -> tuple[Tensor, Tensor]:
        out = model(**inputs).sample
        model.zero_grad()
        out.float().square().sum().backward()
        return out.detach(), model.transformer_blocks[0].attn.to_q.weight.grad.clone()

    expected = results(native)
    for back_end in ("flash", "flash_varlen"):
        flash = copy.deepcopy(native)
        flash.set_attention_backend(back_end)
        name = "flash_attn_func" if back_end == "flash" else "flash_attn_varlen_func"
        with mock.patch.object(attention_dispatch, name, wraps=getattr(attention_dispatch, name)) as function:
            actual = results(flash)
        assert function.call_count == 2  # a layer of each kind
        assert_close(actual, expected, rtol=0.05, atol=0.02)  # bfloat16

    # What a ring of devices calls.
    q, k, v, dout = (torch.randn(2, length, 2, 16, requires_grad=True) for length in (9, 13, 13, 9))
    context = SimpleNamespace(saved_tensors=())
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    out, lse = attention_dispatch._flash_attention_forward_op(context, q, k, v, return_lse=True)
    expected_out, expected_lse, _ = mfa.flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert_close((out, lse), (expected_out, expected_lse.transpose(1, 2)))
    with torch.no_grad():
        grads = attention_dispatch._flash_attention_backward_op(context, dout)
    assert_close(grads, torch.autograd.grad(expected_out, (q, k, v), dout))


if __name__ == "__main__":
    assert mfa.flash_attn.install()
    {"transformers": transformers_back_end, "diffusers": diffusers_back_end}[sys.argv[1]]()
