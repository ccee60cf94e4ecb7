"""Token generation with a cache of our own: prefill, then one token after another.

A layer of grouped heads without a model around it: the queries are random, since what matters is who keeps the keys.
"""

import torch

import mfa

DEVICE = "mps" if torch.backends.mps.is_available() else "cpu"
BATCH, HEADS, KEY_HEADS, DIM, SLOTS = 2, 8, 2, 64, 128


def projections(length: int) -> list[torch.Tensor]:
    """Query, key and value [B,H,L,D] of `length` new tokens."""
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(BATCH, count, length, DIM, dtype=torch.float16, device=DEVICE) for count in heads]


keys, values = (torch.zeros(BATCH, KEY_HEADS, SLOTS, DIM, dtype=torch.float16, device=DEVICE) for _ in range(2))
cached = torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)  # tokens per sequence: they may differ
history = []
for length in (37, 1, 1, 1):  # a prompt, then tokens
    query, key, value = projections(length)
    # The new keys and values are written behind those that are there; each query sees all up to its own.
    out = mfa.attention_with_kv_cache(query, keys, values, key, value, cache_seqlens=cached, is_causal=True)
    cached += length
    history.append((key, value, out))

# The same by plain attention over all tokens so far.
key, value = (torch.cat([step[i] for step in history], dim=2) for i in range(2))
expected = mfa.attention(query, key, value, enable_gqa=True)
torch.testing.assert_close(history[-1][2], expected, atol=2e-3, rtol=0)
print(f"{int(cached[0])} tokens in the cache, {keys.nbytes + values.nbytes:,} bytes, written in place")
