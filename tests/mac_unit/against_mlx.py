"""The same attention by mfa on torch's tensors and by MLX on its own."""

from __future__ import annotations

import time
from typing import Any

import torch

import mfa

from .variants import Problem

REPEATS = 10


def seconds(mx: Any, problem: Problem, dtype: str, dim: int, causal: bool, rounds: int) -> dict[str, float]:
    """Of a call, the least of several rounds in turns; wall-clock, of REPEATS calls that are waited for at once."""
    shape = (1, problem.heads, problem.length, dim)
    ours = [torch.randn(shape, device="mps").to(getattr(torch, dtype)) for _ in range(3)]
    theirs = [mx.random.normal(shape).astype(getattr(mx, dtype)) for _ in range(3)]
    mx.eval(theirs)

    def by_mfa() -> None:
        for _ in range(REPEATS):
            mfa.attention(*ours, is_causal=causal)
        torch.mps.synchronize()

    def by_mlx() -> None:
        mask = "causal" if causal else None
        attend = mx.fast.scaled_dot_product_attention
        mx.eval([attend(*theirs, scale=dim**-0.5, mask=mask) for _ in range(REPEATS)])

    least = {"mfa": float("inf"), "mlx": float("inf")}
    for _ in range(rounds + 1):  # the first of each compiles
        for name, attention in {"mfa": by_mfa, "mlx": by_mlx}.items():
            start = time.perf_counter()
            attention()
            least[name] = min(least[name], (time.perf_counter() - start) / REPEATS)
    return least
