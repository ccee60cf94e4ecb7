"""Packed sequences of flash-attn that mfa.attention_varlen hasn't got, as some that it has.

Tokens are copied to where a plain layout has them, by indices that never leave the device.
"""

import torch
from torch import Tensor

from .._arguments import Varlen
from .._checks.indices import check_index_tensor, host_values
from .._checks.numbers import as_integer
from .._checks.varlen import check_starts
from .._log import once
from ..varlen import attention_varlen
from ._conventions import Bounds


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """`mfa.attention_varlen` with seqused and chunks: out [Tq,Hq,Dv] and lse [Hq,Tq]."""
    chunk = as_integer("attention_chunk", chunk)
    check_layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    (queries,), starts_q = compacted((q,), cu_seqlens_q, seqused_q, None, what="q")
    (k, v), starts_k = compacted((k, v), cu_seqlens_k, seqused_k, None, what="k")
    parts_q, parts_k = starts_q, starts_k
    if chunk > 0:
        parts_q, parts_k = chunks(starts_q, starts_k, max_seqlen_k, chunk)
        max_seqlen_k = min(max_seqlen_k, chunk)
    results = attention_varlen(
        *(queries, k, v, parts_q, parts_k, max_seqlen_q, max_seqlen_k),
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        return_lse=True,
    )
    return results if starts_q is cu_seqlens_q else spread(results, starts_q, cu_seqlens_q)


def check_layout(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """What `mfa.attention_varlen` checks, before tokens are copied by it."""
    check_index_tensor("cu_seqlens_q", cu_seqlens_q, q, "[N+1]", (None,))
    check_index_tensor("cu_seqlens_k", cu_seqlens_k, q, "[N+1] of cu_seqlens_q", (cu_seqlens_q.shape[0],))
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape [0]; it must have shape [N+1], starting with 0")
    layout = (
        cu_seqlens_q,
        cu_seqlens_k,
        as_integer("max_seqlen_q", max_seqlen_q),
        as_integer("max_seqlen_k", max_seqlen_k),
    )
    check_starts(Varlen(q, k, k, *layout, None, None, 1.0))


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


def from_pages(caches: tuple[Tensor, Tensor], table: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, ...]:
    """Keys and values of a paged cache, packed as `starts` says.

    Args:
        caches: [pages,page,Hkv,D] and [pages,page,Hkv,Dv].
        table: int32 [N,pages per sequence].
        starts: int32 [N+1].
        longest: no sequence is longer.

    Returns:
        [N*longest,Hkv,D] and [N*longest,Hkv,Dv], whose last tokens may belong to no sequence.
    """
    cache = caches[0]
    if cache.dim() != 4 or caches[1].shape[:3] != cache.shape[:3]:
        shapes = list(cache.shape), list(caches[1].shape)
        raise ValueError(f"k and v have shapes {shapes}; with block_table they must be [pages,page,Hkv,D] and Dv")
    check_index_tensor("cu_seqlens_k", starts, cache, "[N+1]", (None,))
    sequences = max(starts.shape[0] - 1, 0)
    check_index_tensor("block_table", table, cache, "[N,pages per sequence]", (sequences, None))
    pages, page, width = cache.shape[0], cache.shape[1], table.shape[1]
    if sequences and longest > 0 and (pages == 0 or page * width == 0):
        raise ValueError(f"block_table has shape {list(table.shape)}, k {list(cache.shape)}; they must have pages")
    _check_pages(table, starts, pages, page)
    once("block_table: mfa.flash_attn copies the pages for packed queries; flash_attn_with_kvcache reads them in place")
    sequence, token = _places(starts, sequences * longest)
    number = table[sequence, (token // max(page, 1)).clamp(0, width - 1).long()].clamp(0, pages - 1).long()
    return tuple(tensor[number, token.remainder(max(page, 1)).long()] for tensor in caches)


def chunks(starts_q: Tensor, starts_k: Tensor, longest_k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Starts of the parts of sequences that attention_chunk separates: each part is a sequence of its own.

    A query at position i+Lk-Lq sees keys of its own `chunk` positions. Those before position 0 see none: they are a
    part without keys. The last query and the last key of a part are at one position: its lower right.
    """
    parts = torch.arange(0, max(longest_k, 1), chunk, dtype=torch.int32, device=starts_q.device)
    lengths_q, lengths_k = starts_q.diff()[:, None], starts_k.diff()[:, None]
    first_keys = torch.minimum(parts, lengths_k)
    first_queries = torch.minimum((parts - (lengths_k - lengths_q)).clamp_min(0), lengths_q)
    ends = []
    for starts, firsts in ((starts_q, first_queries), (starts_k, first_keys)):
        of_parts = torch.cat((torch.zeros_like(firsts[:, :1]), firsts), 1) + starts[:-1, None]
        ends.append(torch.cat((of_parts.flatten(), starts[-1:])).to(torch.int32))
    return ends[0], ends[1]


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


def _check_pages(table: Tensor, starts: Tensor, pages: int, page: int) -> None:
    """Those that sequences need, where the host can see them."""
    numbers, ends = host_values(table), host_values(starts)
    if numbers is None or ends is None:
        return
    width = table.shape[1]
    for entry in range(len(ends) - 1):
        length = ends[entry + 1] - ends[entry]
        if length > width * page:
            raise ValueError(f"block_table has {width} pages of {page} tokens; sequence {entry} has {length} tokens")
        for index, number in enumerate(numbers[entry * width : entry * width + -(-length // max(page, 1))]):
            if not 0 <= number < pages:
                raise ValueError(
                    f"block_table has page {number} at [{entry}, {index}]; it must be within 0 ... {pages - 1}"
                )
