"""What packed attention over pages refuses, with the sentences of tensors.py."""

from .._arguments import Paged
from .cache import check_caches, check_live_pages, check_page
from .indices import check_index_tensor, host_values
from .numbers import as_integer
from .tensors import check_features, check_tensors
from .varlen import check_starts_of


def capacity(arguments: Paged) -> int:
    """How many tokens one sequence may have."""
    tokens: int = arguments.block_table.shape[1] * arguments.key.shape[2]
    return tokens


def check_paged(arguments: Paged, *, metal: bool) -> None:
    """Everything about the arguments of `mfa::attention_varlen_paged`, except what `check_paged_contents` checks."""
    query, key, value, starts = arguments.query, arguments.key, arguments.value, arguments.cu_seqlens_q
    check_tensors(query, query, query, ranks=(3,))
    scales = arguments.key_scale, arguments.value_scale
    check_caches(query.transpose(0, 1).unsqueeze(0), (key, value), scales, ("key", "value"))
    check_index_tensor("cu_seqlens_q", starts, query, "[N+1]", (None,))
    if starts.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape [0]; it must have shape [N+1], starting with 0")
    sequences = starts.shape[0] - 1
    check_index_tensor("seqused_k", arguments.seqused_k, query, "[N]", (sequences,))
    check_index_tensor("block_table", arguments.block_table, query, "[N,pages per sequence]", (sequences, None))
    check_page("key", key, arguments.block_table)
    as_integer("max_seqlen_q", arguments.max_seqlen_q)
    as_integer("max_seqlen_k", arguments.max_seqlen_k)
    as_integer("num_splits", arguments.num_splits)
    check_features(arguments, ("N", sequences), metal=metal)


def check_paged_contents(arguments: Paged) -> None:
    """Contents of cu_seqlens_q, seqused_k and the block table, where the host can see them."""
    check_starts_of("q", arguments.cu_seqlens_q, "query", arguments.query, arguments.max_seqlen_q)
    lengths, slots = host_values(arguments.seqused_k), capacity(arguments)
    if lengths is None:
        return
    for n, length in enumerate(lengths):
        if not 0 <= length <= slots:
            raise ValueError(f"seqused_k is {length} at {n}; it must be within 0 ... {slots}, what the pages can hold")
        if length > arguments.max_seqlen_k:
            raise ValueError(
                f"max_seqlen_k is {arguments.max_seqlen_k}; it must be at least every seqused_k, and that of {n} is "
                f"{length}"
            )
    check_live_pages(arguments.block_table, lengths, arguments.key)
