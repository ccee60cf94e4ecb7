"""What packed attention refuses, with the sentences of tensors.py."""

import itertools

from torch import Tensor

from .._arguments import Varlen
from .indices import check_index_tensor, host_values
from .numbers import as_integer
from .tensors import check_dropout, check_features, check_shapes, check_tensors


def check_forward(arguments: Varlen, *, metal: bool, drawn: bool = False) -> None:
    """Everything about the arguments of `mfa::attention_varlen_forward`, except what `check_starts` checks.

    Args: as those of dense attention's.
    """
    query, key, value = arguments.query, arguments.key, arguments.value
    check_tensors(query, key, value, ranks=(3,))
    check_shapes(*(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)))
    starts = arguments.cu_seqlens_q
    check_index_tensor("cu_seqlens_q", starts, query, "[N+1]", (None,))
    if starts.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape [0]; it must have shape [N+1], starting with 0")
    check_index_tensor("cu_seqlens_k", arguments.cu_seqlens_k, query, "[N+1] of cu_seqlens_q", (starts.shape[0],))
    if arguments.seqused_k is not None:
        check_index_tensor("seqused_k", arguments.seqused_k, query, "[N]", (starts.shape[0] - 1,))
    as_integer("max_seqlen_q", arguments.max_seqlen_q)
    as_integer("max_seqlen_k", arguments.max_seqlen_k)
    check_features(arguments, ("N", starts.shape[0] - 1), metal=metal)
    check_dropout(arguments, drawn=drawn)


def check_starts(arguments: Varlen) -> None:
    """Contents of cu_seqlens and seqused_k, where the host can see them."""
    check_starts_of("q", arguments.cu_seqlens_q, "query", arguments.query, arguments.max_seqlen_q)
    lengths = check_starts_of("k", arguments.cu_seqlens_k, "key", arguments.key, arguments.max_seqlen_k)
    if arguments.seqused_k is not None:
        check_used(arguments.seqused_k, lengths)


def check_used(seqused_k: Tensor, lengths: list[int] | None) -> None:
    """Contents of seqused_k, where the host can see them."""
    for n, (count, length) in enumerate(zip(host_values(seqused_k) or (), lengths or (), strict=False)):
        if not 0 <= count <= length:
            raise ValueError(f"seqused_k is {count} at {n}; it must be within 0 ... {length}, the sequence's length")


def check_starts_of(side: str, starts: Tensor, name: str, tensor: Tensor, longest: int) -> list[int] | None:
    """Contents of one cu_seqlens, where the host can see them; returns the lengths."""
    values, tokens = host_values(starts), tensor.shape[0]
    if values is None:
        return None
    if values[0] != 0:
        raise ValueError(f"cu_seqlens_{side} starts with {values[0]}; it must start with 0")
    lengths = [end - start for start, end in itertools.pairwise(values)]
    for n, length in enumerate(lengths):
        if length < 0:
            fall = f"{values[n]} to {values[n + 1]} at {n + 1}"
            raise ValueError(f"cu_seqlens_{side} falls from {fall}; it must not decrease")
    if values[-1] > tokens:
        raise ValueError(f"cu_seqlens_{side} ends with {values[-1]}; it must be at most the {tokens} tokens of {name}")
    for n, length in enumerate(lengths):
        if length > longest:
            raise ValueError(
                f"max_seqlen_{side} is {longest}; it must be at least the length of every sequence, and that of "
                f"{n} is {length}"
            )
    return lengths
