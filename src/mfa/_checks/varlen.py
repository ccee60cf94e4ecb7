"""What packed attention refuses, with the sentences of tensors.py."""

import itertools

import torch
from torch import Tensor

from .indices import check_index_tensor, check_integer, check_metal_dtype, check_per_head, host_values
from .tensors import check_rng_state, check_shapes, check_tensors, check_values


def check_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    *,
    metal: bool,
) -> None:
    """Everything about the arguments of `mfa::attention_varlen_forward`, except what `check_starts` checks, and that
    dropout has a state (`check_has_state`).
    """
    check_tensors(query, key, value, ranks=(3,))
    check_shapes(*(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)))
    check_index_tensor("cu_seqlens_q", cu_seqlens_q, query, "[N+1]", (None,))
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape [0]; it must have shape [N+1], starting with 0")
    check_index_tensor("cu_seqlens_k", cu_seqlens_k, query, "[N+1] of cu_seqlens_q", (cu_seqlens_q.shape[0],))
    check_integer("max_seqlen_q", max_seqlen_q)
    check_integer("max_seqlen_k", max_seqlen_k)
    heads, sequences = query.shape[1], cu_seqlens_q.shape[0] - 1
    if sinks is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        check_per_head("sinks", sinks, query, heads, None, (torch.float32, wide))
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, query, heads, ("N", sequences), (torch.float32,))
    check_values(scale, softcap, dropout_p)
    if rng_state is not None:
        check_rng_state(rng_state, dropout_p, query)
    if metal:
        check_metal_dtype(query)


def check_starts(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """Contents of cu_seqlens, where the host can see them."""
    for side, starts, tokens, longest in (
        ("q", cu_seqlens_q, query.shape[0], max_seqlen_q),
        ("k", cu_seqlens_k, key.shape[0], max_seqlen_k),
    ):
        values = host_values(starts)
        if values is None:
            continue
        name = f"cu_seqlens_{side}"
        if values[0] != 0:
            raise ValueError(f"{name} starts with {values[0]}; it must start with 0")
        lengths = [end - start for start, end in itertools.pairwise(values)]
        for n, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"{name} falls from {values[n]} to {values[n + 1]} at {n + 1}; it must not decrease")
        if values[-1] > tokens:
            tensor = "query" if side == "q" else "key"
            raise ValueError(f"{name} ends with {values[-1]}; it must be at most the {tokens} tokens of {tensor}")
        for n, length in enumerate(lengths):
            if length > longest:
                raise ValueError(
                    f"max_seqlen_{side} is {longest}; it must be at least the length of every sequence, and that of "
                    f"{n} is {length}"
                )
