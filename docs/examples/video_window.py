"""A window over a long video: each frame sees those near it, and work grows with the length instead of its square.

Tokens lie frame by frame, so frames nearby are a window of tokens.
"""

import torch

import mfa

DEVICE = "mps" if torch.backends.mps.is_available() else "cpu"
FRAMES, TOKENS, NEAR, HEADS, DIM = 48, 64, 2, 2, 64  # so many tokens per frame; frames seen on both sides

length, reach = FRAMES * TOKENS, NEAR * TOKENS
query, key, value = (torch.randn(1, HEADS, length, DIM, device=DEVICE, requires_grad=True) for _ in range(3))
out = mfa.attention(query, key, value, window=(reach, reach))
out.sum().backward()

# One row by hand: a query in the middle, and the keys within its reach.
middle = length // 2 + 17
seen = slice(middle - reach, middle + reach + 1)
scores = query[:, :, middle : middle + 1] @ key[:, :, seen].transpose(-1, -2) / DIM**0.5
expected = scores.softmax(-1) @ value[:, :, seen]
torch.testing.assert_close(out[:, :, middle : middle + 1], expected, atol=1e-5, rtol=0)

share = (2 * reach + 1) / length
print(f"{length} tokens, each sees {2 * reach + 1}: {share:.0%} of the work of dense attention, forward and backward")
