"""A training step on documents of different lengths, packed one behind the other: no padding, no mask."""

import torch

import mfa

DEVICE = "mps" if torch.backends.mps.is_available() else "cpu"
HEADS, DIM = 4, 32
LENGTHS = [70, 5, 33]

starts = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0, dtype=torch.int32)
longest = max(LENGTHS)
project = torch.nn.Linear(HEADS * DIM, 3 * HEADS * DIM).to(DEVICE)
tokens = torch.randn(sum(LENGTHS), HEADS * DIM, device=DEVICE)


def attend(x: torch.Tensor) -> torch.Tensor:
    """Causal within each document; [T, H*D] to [T, H*D]."""
    query, key, value = project(x).unflatten(1, (3, HEADS, DIM)).unbind(1)
    out = mfa.attention_varlen(query, key, value, starts, starts, longest, longest, is_causal=True)
    return out.flatten(1)


out = attend(tokens)
out.square().mean().backward()

# Document by document, as if there were no others.
packed = project.weight.grad.clone()
project.zero_grad()
alone = []
for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
    qkv = project(tokens[first:last]).unflatten(1, (3, 1, HEADS, DIM)).permute(1, 2, 3, 0, 4)
    alone.append(mfa.attention(*qkv, is_causal=True)[0].transpose(0, 1).flatten(1))
torch.cat(alone).square().mean().backward()
torch.testing.assert_close(out, torch.cat(alone), atol=1e-5, rtol=0)
torch.testing.assert_close(packed, project.weight.grad, atol=1e-5, rtol=0)
print(f"{len(LENGTHS)} documents, {len(tokens)} tokens, one call for all of them")
