"""Attention and its gradients with torch's own operations, a block of rows at a time, in a dtype of choice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import standalone

# Scores of a block. With narrow types and gradients a whole head of 2^15 queries and keys: torch sums over all of them.
SCORES, SCORES_OF_PLAIN_GRADIENTS = 1 << 28, 1 << 30


@dataclass
class Unit:
    """The query heads of one key head: query [G,Lq,D], key [Lk,D], value [Lk,Dv], in the problem's dtype."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    bias: Tensor | None = None  # [G or 1, Lq or 1, Lk or 1]
    slopes: Tensor | None = None  # [G]
    sinks: Tensor | None = None  # [G]
    heads: Tensor | None = None  # batch * Hq + head of each, for dropout
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    grad_out: Tensor | None = None  # [G,Lq,Dv]
    grad_lse: Tensor | None = None  # [G,Lq]

    def evaluate(self, dtype: torch.dtype, rounds_to: torch.dtype | None = None) -> dict[str, Tensor]:
        """out, lse and, with grad_out, gradients, computed in `dtype` and then rounded to the other one."""
        wanted = self.grad_out is not None
        leaves = {"query": self.query, "key": self.key, "value": self.value, "bias": self.bias, "sinks": self.sinks}
        leaves["alibi"] = self.slopes
        with torch.set_grad_enabled(wanted):
            found = {
                name: leaf.detach().to(dtype).requires_grad_() if wanted and leaf.dtype != torch.bool else leaf
                for name, leaf in leaves.items()
                if leaf is not None
            }
            group, length = self.query.shape[:2]
            limit = SCORES_OF_PLAIN_GRADIENTS if wanted and dtype != torch.float64 else SCORES // (4 if wanted else 1)
            heads = max(1, min(group, limit // max(1, length * self.key.shape[0])))
            rows = max(1, min(length, limit // max(1, heads * self.key.shape[0])))
            outs, lses = [], []
            for head in range(0, group, heads):
                for first in range(0, max(1, length), rows):
                    part = slice(head, head + heads), slice(first, min(first + rows, length))
                    out, lse = self._block(found, *part, dtype)
                    if wanted:
                        self._backward(out, lse, *part)
                    outs.append(out.detach().flatten(0, 1))
                    lses.append(lse.detach().flatten())
        results = {"out": torch.cat(outs).unflatten(0, (group, length)), "lse": torch.cat(lses).view(group, length)}
        if wanted:
            results |= {
                f"grad_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                for name, leaf in found.items()
                if leaf.dtype != torch.bool
            }
        if rounds_to is not None:
            for name in ("out", "grad_query", "grad_key", "grad_value"):
                if name in results:
                    results[name] = results[name].to(rounds_to)
        return results

    def _block(self, leaves: dict[str, Tensor], heads: slice, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = leaves["key"].to(dtype), leaves["value"].to(dtype)
        keys, length = key.shape[0], self.query.shape[1]
        scores = torch.matmul(leaves["query"][heads, rows].to(dtype), key.T) * self.scale
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        # Row i stands at the key i + Lk - Lq.
        i = torch.arange(rows.start, rows.stop, device=key.device)[:, None] + (keys - length)
        j = torch.arange(keys, device=key.device)[None]
        seen = torch.ones((), dtype=torch.bool, device=key.device)
        if self.window_left is not None:
            seen = seen & (j >= i - self.window_left)
        if self.window_right is not None:
            seen = seen & (j <= i + self.window_right)
        if "bias" in leaves:
            bias = leaves["bias"][heads] if leaves["bias"].shape[0] > 1 else leaves["bias"]
            bias = bias[:, rows] if bias.shape[1] > 1 else bias
            if bias.dtype == torch.bool:
                seen = seen & bias
            else:
                scores = scores + bias.to(dtype)
        if "alibi" in leaves:
            scores = scores - leaves["alibi"].to(dtype)[heads, None, None] * (i - j).abs().to(dtype)
        if seen.dim():
            scores = scores.masked_fill(~seen, -math.inf)
        logits = scores
        if "sinks" in leaves:
            logits = torch.cat([scores, leaves["sinks"].to(dtype)[heads, None, None].expand(*scores.shape[:2], 1)], -1)
        lse = torch.logsumexp(logits, -1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -math.inf)
        shift = lse.masked_fill(lse == -math.inf, 0)
        probability = torch.exp(scores - shift[..., None])
        if self.dropout_p > 0:
            assert self.heads is not None
            assert self.rng_state is not None
            with torch.device(key.device):
                factors = standalone.load("_cpu/dropout.py").keep_factors(
                    self.rng_state, self.heads[heads], rows, slice(0, keys), self.dropout_p, dtype
                )
            probability = probability * factors
        return torch.matmul(probability, value), lse

    def _backward(self, out: Tensor, lse: Tensor, heads: slice, rows: slice) -> None:
        assert self.grad_out is not None
        objective = (out * self.grad_out[heads, rows].to(out.dtype)).sum(dtype=torch.float64)
        if self.grad_lse is not None:
            finite = lse.masked_fill(lse.isinf(), 0)
            objective = objective + (finite * self.grad_lse[heads, rows].to(lse.dtype)).sum(dtype=torch.float64)
        objective.backward()
