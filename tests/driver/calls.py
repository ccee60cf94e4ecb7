"""The calls of inference whose cost on the host is measured (host_cost.py) and counted (host_counts.py)."""

from collections.abc import Callable

import torch

import mfa


def calls() -> dict[str, Callable[[], object]]:
    """Name -> one query of one token on the `mps` device. To be called in the inference mode in which they run."""
    ops = torch.ops.mfa
    query, key, value = (torch.randn(1, 8, 1, 64, device="mps") for _ in range(3))
    cache = [torch.randn(1, 8, 512, 64, device="mps") for _ in range(2)]
    length = torch.tensor([300], dtype=torch.int32, device="mps")
    tables = [torch.randn(512, 32, device="mps") for _ in range(2)]
    nothing = (None, None, None, 0.125, None, None, 0.0)
    return {
        "mfa.attention": lambda: mfa.attention(query, key, value),
        "torch.ops.mfa.attention": lambda: ops.attention(query, key, value),
        "attention_forward": lambda: ops.attention_forward(query, key, value, *nothing, 0.0, None, None),
        "attention_decode": lambda: ops.attention_decode(
            query, *cache, length, None, None, None, None, None, None, None, 0.125, None, None, 0.0, 0
        ),
        "attention_append": lambda: ops.attention_append(
            query, *cache, key, value, length, 0, None, None, None, *tables, None, True, True
        ),
        "attention_with_kv_cache": lambda: mfa.attention_with_kv_cache(
            query, *cache, key, value, cache_seqlens=length, rotary_cos=tables[0], rotary_sin=tables[1]
        ),
    }
