"""Keys and values go around in a ring of processes, while each keeps its queries (Liu et al. 2023, Ring Attention).

    forward, for the keys and values of each process, the own ones first:
        out_s, lse_s <- attention of the own queries over them, if they see any; out_s before it was rounded
        out, lse <- merge_attention(out, lse, out_s, lse_s)
    backward, in the same order and in at least float32, with w = exp(lse_s - lse):
        dout_s = w dout,  dlse_s = w (dlse + rowsum(dout * (out_s - out)))
        dq += ...,  and dk, dv go around with their k and v, and come home

The next part travels while this one is computed. A process holds its own keys and values and two parts in transit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _simulation
from .._arguments import DENSE_GRADIENTS, Backward, Dense
from .._checks.dense import check_forward
from .._checks.tensors import scale_of, widened
from .._cpu.blocks import HIDDEN, Window
from .._cpu.layout import empty_correction, lost_to_rounding
from .._ops import ops
from ..merge import merge_attention


@dataclass(frozen=True)
class Terms:
    """What the whole sequence's attention is, besides its tensors."""

    is_causal: bool
    window_left: int | None
    window_right: int | None
    scale: float | None
    softcap: float

    def of(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Dense:
        """The op's arguments, but for `is_causal`."""
        return Dense(
            query=query,
            key=key,
            value=value,
            bias=None,
            sinks=sinks,
            alibi_slopes=None,
            scale=scale_of(query, self.scale),
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
        )


@dataclass(frozen=True)
class Part:
    """A process's place in the ring, and its window on the part of the keys that comes from `source`."""

    source: int
    key_length: int
    window_left: int | None
    window_right: int | None
    is_visible: bool


class _Result(NamedTuple):
    """What `attention_forward_with_correction` returns."""

    out: Tensor
    lse: Tensor
    correction: Tensor

    @classmethod
    def of(cls, exact: Tensor, lse: Tensor, dtype: torch.dtype) -> _Result:
        out = exact.to(dtype)
        correction = empty_correction(out)
        if correction.numel():
            correction.copy_(lost_to_rounding(exact, out))
        return cls(out, lse, correction)

    def exact(self) -> Tensor:
        """Out before it was rounded, of at least float32."""
        wide = self.out.to(torch.promote_types(self.out.dtype, torch.float32))
        return wide + self.correction if self.correction.numel() else wide


@dataclass(frozen=True)
class Ring:
    """The group as one process sees it."""

    group: Any  # None: the default one
    rank: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, group: Any) -> Ring:
        """Collective: the processes tell each other their sizes."""
        batch, heads, query_length, dim = query.shape
        names = ("batch size", "query heads", "key heads", "head dimension", "head dimension of value")
        sizes = (batch, heads, key.shape[1], dim, value.shape[3])
        own = torch.tensor([*sizes, query_length, key.shape[2]], device=query.device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        rows = [tensor.tolist() for tensor in gathered]
        for rank, row in enumerate(rows):
            for name, size, other in zip(names, rows[0], row, strict=False):
                if size != other:
                    raise ValueError(f"{name} is {other} in process {rank}; it must be that of process 0, {size}")
        return cls(group, dist.get_rank(group), tuple(row[5] for row in rows), tuple(row[6] for row in rows))

    def parts(self, terms: Terms) -> list[Part]:
        """In the order in which they come by: the own one, then those of the processes before."""
        size = len(self.key_lengths)
        query_length, total = self.query_lengths[self.rank], sum(self.query_lengths)
        shift = sum(self.key_lengths) - total  # of the whole: i sees j by j - (i + shift)
        right = terms.window_right
        if terms.is_causal:
            right = -shift if right is None else min(right, -shift)
        parts = []
        for source in (*range(self.rank, -1, -1), *range(size - 1, self.rank, -1)):
            length = self.key_lengths[source]
            first_query, first_key = sum(self.query_lengths[: self.rank]), sum(self.key_lengths[:source])
            # In numbers that start with the part: j - (i + first_query - first_key + shift).
            moved = (first_query - first_key + shift) - (length - query_length)
            bounds = (
                None if terms.window_left is None else terms.window_left - moved,
                None if right is None else right + moved,
            )
            rows = Window.of(query_length, length, *bounds).rows()
            parts.append(Part(source, length, *bounds, rows.start < rows.stop))
        return parts

    def pass_on(self, tensor: Tensor, received: Tensor) -> list[Any]:
        """Starts to send to the next process, and to receive from the one before; empty tensors stay."""
        size = len(self.key_lengths)
        transfers = [(dist.isend, tensor, (self.rank + 1) % size), (dist.irecv, received, (self.rank - 1) % size)]
        operations = [
            dist.P2POp(function, buffer, group=self.group, group_peer=peer)
            for function, buffer, peer in transfers
            if buffer.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []


def attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, terms: Terms, group: Any
) -> tuple[Tensor, Tensor]:
    """Out and lse of this process's queries; see `context_parallel`."""
    sinks = widened(sinks, query)
    check_forward(terms.of(query, key, value, sinks), metal=_simulation.runs_kernels(query))
    ring = Ring.of(query, key, value, group)
    outputs: tuple[Tensor, Tensor] = _RingAttention.apply(query, key, value, sinks, ring, terms)  # type: ignore[no-untyped-call]
    return outputs


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _sizes(key: Tensor, value: Tensor, length: int) -> tuple[int, int]:
    """How many numbers a part's key and value have."""
    rows = key.shape[0] * key.shape[1] * length
    return rows * key.shape[3], rows * value.shape[3]


def _unpacked(buffer: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The key and value in a buffer, of `length` and otherwise of these shapes."""
    parts = buffer.split(_sizes(key, value, length))
    keys, values = (
        part.view(*tensor.shape[:2], length, tensor.shape[3]) for part, tensor in zip(parts, (key, value), strict=True)
    )
    return keys, values


def _around(ring: Ring, parts: list[Part], key: Tensor, value: Tensor) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Each part with its key and value, while the next one is on its way. Every process must take all of them."""
    buffer = key if len(parts) == 1 else torch.cat([key.flatten(), value.flatten()])
    for step, part in enumerate(parts):
        received = buffer
        works: list[Any] = []
        if step + 1 < len(parts):
            received = buffer.new_empty(sum(_sizes(key, value, parts[step + 1].key_length)))
            works = ring.pass_on(buffer, received)
        yield part, *((key, value) if step == 0 else _unpacked(buffer, key, value, part.key_length))
        _wait(works)
        buffer = received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, ring: Ring, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        exact, lse = None, None
        for part, keys, values in _around(ring, ring.parts(terms), key, value):
            is_own = part.source == ring.rank
            if not (part.is_visible or is_own):
                continue
            # The own part is the first, and has the sink.
            result = _forward_part(query, keys, values, sinks if is_own else None, part, terms)
            if exact is None or lse is None:
                exact, lse = result.exact(), result.lse
            else:
                exact, lse = merge_attention(exact, lse, result.exact(), result.lse)
        assert exact is not None
        assert lse is not None
        whole = _Result.of(exact, lse, query.dtype)
        ctx.save_for_backward(query, key, value, sinks, *whole)
        ctx.ring, ctx.terms = ring, terms
        return whole.out, whole.lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, *whole = ctx.saved_tensors
        ring, parts = ctx.ring, ctx.ring.parts(ctx.terms)
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query, grad_sinks = torch.zeros_like(query, dtype=wide), None
        # Gradients that the processes before have begun for the part that is here, and those on their way from here.
        begun: Tensor | None = None
        sent = grad_query
        works: list[Any] = []
        for step, (part, keys, values) in enumerate(_around(ring, parts, key, value)):
            is_own = part.source == ring.rank
            grads = torch.zeros(keys.numel() + values.numel(), dtype=wide, device=key.device)
            if part.is_visible or is_own:
                of_part = _backward_part(
                    *(grad_out, grad_lse, query, keys, values, _Result(*whole), sinks if is_own else None),
                    *(part, ctx.terms),
                )
                grad_query += of_part["query"]
                grads.copy_(torch.cat([of_part["key"].flatten(), of_part["value"].flatten()]))
                grad_sinks = of_part["sinks"] if is_own else grad_sinks
            _wait(works)
            if begun is not None:
                grads += begun
            following = parts[(step + 1) % len(parts)]  # in the end, the own part comes home
            begun, sent = grads.new_empty(sum(_sizes(key, value, following.key_length))), grads
            works = ring.pass_on(sent, begun) if len(parts) > 1 else []
        _wait(works)
        home = sent if begun is None or len(parts) == 1 else begun
        grad_key, grad_value = _unpacked(home, key, value, key.shape[2])
        sums = (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))
        return (*sums, None if sinks is None else grad_sinks, None, None)


def _arguments(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, part: Part, terms: Terms) -> Dense:
    """Of the op, for a part."""
    return terms.of(query, key, value, sinks)._replace(window_left=part.window_left, window_right=part.window_right)


def _forward_part(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, part: Part, terms: Terms) -> _Result:
    arguments = _arguments(query, key, value, sinks, part, terms)
    return _Result(*ops.attention_forward_with_correction(*arguments, sinks is not None))


def _backward_part(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole: _Result,
    sinks: Tensor | None,
    part: Part,
    terms: Terms,
) -> dict[str, Tensor]:
    """Gradients for a part, by the names of the arguments. In 16 bits each part would be rounded before they add up."""
    result = _forward_part(query, key, value, sinks, part, terms)
    out = result.exact()
    grad_out, query, key, value = (tensor.to(out.dtype) for tensor in (grad_out, query, key, value))
    weight = torch.exp(result.lse - whole.lse).masked_fill(result.lse == HIDDEN, 0)
    moved = (grad_out * (out - whole.exact())).sum(-1)
    part_grad_lse = (weight * (grad_lse + moved)).to(torch.float32)
    wanted = {"query", "key", "value"} if sinks is None else {"query", "key", "value", "sinks"}
    given = Backward(
        grad_out=grad_out * weight.unsqueeze(-1),
        grad_lse=part_grad_lse,
        out=out,
        lse=result.lse,
        correction=None,
        output_mask=[name in wanted for name in DENSE_GRADIENTS],
    )
    grads = ops.attention_backward(*_arguments(query, key, value, sinks, part, terms), *given)
    return dict(zip(DENSE_GRADIENTS, grads, strict=True))
