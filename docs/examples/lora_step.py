"""A LoRA step on a transformers model: the weights are frozen, two thin matrices per projection learn."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import mfa.transformers

DEVICE = "mps" if torch.backends.mps.is_available() else "cpu"


class Adapted(nn.Module):
    """A frozen linear layer plus a product of rank `rank`, which starts as zero."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


mfa.transformers.register()
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(config, attn_implementation="mfa").requires_grad_(False)
for block in model.model.layers:
    block.self_attn.q_proj, block.self_attn.v_proj = map(Adapted, (block.self_attn.q_proj, block.self_attn.v_proj))
model.to(DEVICE)

tokens = torch.randint(64, (2, 48), device=DEVICE)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
loss = model(tokens, labels=tokens).loss
loss.backward()
optimizer.step()
after = model(tokens, labels=tokens).loss
assert after < loss, "one step lowers it"
print(f"the loss falls from {loss:.3f} to {after:.3f}")
