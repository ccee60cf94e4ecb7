"""Packed sequences of flash-attn that mfa.attention_varlen hasn't got, as some that it has.

Tokens are copied to where a plain layout has them, by indices that never leave the device.
"""

from typing import Any

import torch
from torch import Tensor

from .._checks.indices import check_index_tensor, host_values
from .._checks.numbers import as_integer
from .._checks.varlen import check_starts_of, check_used
from .._log import once
from ..varlen import attention_varlen
from ._conventions import Bounds, heads_first


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    *,
    scale: float | None,
    window: Bounds,
    softcap: float,
    chunk: int = 0,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mfa.attention_varlen` with seqused_q and chunks: out [Tq,Hq,Dv] and lse [Hq,Tq].

    With block_table, k and v are pages [pages,page,Hkv,D], and there are no chunks; without it, cu_seqlens_k is given.
    """
    chunk = as_integer("attention_chunk", chunk)
    terms: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    check_queries(q, cu_seqlens_q, max_seqlen_q)
    if block_table is None:
        check_keys(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, seqused_k)
    (queries,), starts_q = compacted((q,), cu_seqlens_q, seqused_q, None, what="q")
    if block_table is not None:
        lengths = lengths_of(q, cu_seqlens_k, seqused_k)
        layout = (starts_q, lengths, max_seqlen_q, max_seqlen_k)
        results = over_pages(queries, k, v, *layout, block_table=block_table, **terms)
    else:
        starts, longest = (starts_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        if chunk > 0:
            starts, seqused_k = chunks(starts, seqused_k, max_seqlen_k, chunk)
        results = attention_varlen(queries, k, v, *starts, *longest, **terms, seqused_k=seqused_k, return_lse=True)
    return results if starts_q is cu_seqlens_q else spread(results, starts_q, cu_seqlens_q)


def over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **terms: Any,
) -> tuple[Tensor, Tensor]:
    """`mfa.attention_varlen` of pages [pages,page,Hkv,D], read in place: out [Tq,Hq,Dv] and lse [Hq,Tq]."""
    pages, layout = (heads_first("k", k), heads_first("v", v)), (cu_seqlens_q, None, max_seqlen_q, max_seqlen_k)
    results: tuple[Tensor, Tensor] = attention_varlen(
        *(q, *pages, *layout), seqused_k=seqused_k, **terms, return_lse=True
    )
    return results


def lengths_of(q: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None) -> Tensor:
    """Live tokens of sequences in pages, int32 [N]: flash-attn gives either."""
    if seqused_k is not None:
        return seqused_k
    if cu_seqlens_k is None:
        raise ValueError("seqused_k is None; it, or cu_seqlens_k, must be given with pages")
    check_index_tensor("cu_seqlens_k", cu_seqlens_k, q, "[N+1]", (None,))
    return cu_seqlens_k.diff()


def check_queries(q: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int) -> None:
    """What `mfa.attention_varlen` checks, before queries are copied by it."""
    check_index_tensor("cu_seqlens_q", cu_seqlens_q, q, "[N+1]", (None,))
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape [0]; it must have shape [N+1], starting with 0")
    check_starts_of("q", cu_seqlens_q, "query", q, as_integer("max_seqlen_q", max_seqlen_q))


def check_keys(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int, seqused_k: Tensor | None = None
) -> None:
    """The same of packed keys."""
    check_index_tensor("cu_seqlens_k", cu_seqlens_k, q, "[N+1] of cu_seqlens_q", (cu_seqlens_q.shape[0],))
    lengths = check_starts_of("k", cu_seqlens_k, "key", k, as_integer("max_seqlen_k", max_seqlen_k))
    if seqused_k is not None:
        check_index_tensor("seqused_k", seqused_k, q, "[N]", (cu_seqlens_q.shape[0] - 1,))
        check_used(seqused_k, lengths)


def starts_of(batch: int, length: int, device: torch.device) -> Tensor:
    """cu_seqlens, int32 [B+1], of sequences that all have one length."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def compacted(
    tensors: tuple[Tensor, ...], starts: Tensor, used: Tensor | None, leftpad: Tensor | None, *, what: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of each sequence, the tokens within leftpad ... used-1, packed.

    Args:
        tensors: [T,...].
        starts: int32 [N+1].
        used, leftpad: int32 [N]; None is all of a sequence, and 0.
        what: which arguments these are, for errors.

    Returns:
        tensors [T,...], whose last ones belong to no sequence, and starts.
    """
    if (used is None and leftpad is None) or starts.shape[0] < 2:
        return tensors, starts
    lengths = starts.diff()
    for name, counts, limit in (("seqused", used, lengths), ("leftpad", leftpad, lengths if used is None else used)):
        if counts is not None:
            _check_counts(f"{name}_{what}", counts, tensors[0], limit)
    begins = starts[:-1] if leftpad is None else starts[:-1] + leftpad
    lengths = lengths if used is None else used
    packed = _accumulated(lengths if leftpad is None else lengths - leftpad)
    once(f"seqused_{what}, leftpad_{what}: mfa.flash_attn copies the tokens that count")
    sequence, token = _places(packed, tensors[0].shape[0])
    rows = (begins[sequence] + token).clamp(0, max(tensors[0].shape[0] - 1, 0)).long()
    return tuple(tensor[rows] for tensor in tensors), packed


def spread(results: tuple[Tensor, Tensor], packed: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Out [T,H,D] and lse [H,T] of queries that `compacted` packed, where they were; 0 and -inf elsewhere."""
    out, lse = results
    sequence, token = _places(starts, out.shape[0])
    inside = token < packed.diff()[sequence]  # behind the last sequence, tokens count on from its start
    rows = (packed[sequence] + token).clamp(0, max(out.shape[0] - 1, 0)).long()
    return (
        out[rows].masked_fill(~inside[:, None, None], 0),
        lse[:, rows].masked_fill(~inside, -torch.inf),
    )


def chunks(
    starts: tuple[Tensor, Tensor], used_k: Tensor | None, longest_k: int, chunk: int
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The parts of sequences that attention_chunk separates: starts, and seqused_k; each part is a sequence of its own.

    A query at position i+Lk-Lq sees keys of its own `chunk` positions. Those before position 0 see none: they are a
    part without keys. The last query and the last key of a part are at one position: its lower right.
    """
    starts_q, starts_k = starts
    parts = torch.arange(0, max(longest_k, 1), chunk, dtype=torch.int32, device=starts_q.device)
    lengths_q, lengths_k = starts_q.diff()[:, None], (starts_k.diff() if used_k is None else used_k)[:, None]
    first_keys = torch.minimum(parts, lengths_k)
    first_queries = torch.minimum((parts - (lengths_k - lengths_q)).clamp_min(0), lengths_q)
    ends = []
    for begins, firsts in ((starts_q, first_queries), (starts_k, first_keys)):
        of_parts = torch.cat((torch.zeros_like(firsts[:, :1]), firsts), 1) + begins[:-1, None]
        ends.append(torch.cat((of_parts.flatten(), begins[-1:])).to(torch.int32))
    if used_k is not None:
        used_k = torch.cat((torch.zeros_like(lengths_k), first_keys, lengths_k), 1).diff().flatten()
    return (ends[0], ends[1]), used_k


def _accumulated(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _places(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Which sequence each token is in, and which of its tokens it is; the last sequence for those behind it."""
    numbers = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
    sequence = torch.searchsorted(starts[1:], numbers, right=True).clamp_max(max(starts.shape[0] - 2, 0))
    return sequence, numbers - starts[sequence]


def _check_counts(name: str, counts: Tensor, like: Tensor, limits: Tensor) -> None:
    check_index_tensor(name, counts, like, "[N]", (limits.shape[0],))
    values, largest = host_values(counts), host_values(limits)
    for entry, (value, limit) in enumerate(zip(values or (), largest or (), strict=False)):
        if not 0 <= value <= limit:
            raise ValueError(f"{name} is {value} at {entry}; it must be within 0 ... {limit}")
