"""Masks for transformers, kept as what they say: a window, a row of keys and sequences in a row, or blocks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils as hf

from .. import _torch
from ..block_mask import PackedBlockMask
from ._models import attends_by_itself, is_eager_only, refuse

_Window = tuple[int | None, int | None]
# Of queries and keys; below, a matrix costs less than to pack it.
LONG = 4096


class Mask(Tensor):
    """A mask [B,1,Lq,Lk] that is kept as what it says, for `attention` of mfa.transformers.

    For everybody else it is a tensor: whatever is done to it is done to the matrix itself. That is bool, True = attend,
    or, for models that know eager attention only, what is added to scores there: 0, or the dtype's least number.
    """

    window: _Window  # relative to the lower right
    keys: Tensor | None  # bool [B,1,1,Lk]
    sequences: Tensor | None  # integers [B,L], Lq = Lk = L: tokens see their own sequence
    blocks: PackedBlockMask | None  # [B,1,Lq,Lk], all that there is to say
    _matrix: Tensor | None
    _starts: tuple[Tensor | None, Tensor] | None

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        device: torch.device | str,
        window: _Window,
        keys: Tensor | None,
        sequences: Tensor | None = None,
        dtype: torch.dtype = torch.bool,
        blocks: PackedBlockMask | None = None,
    ) -> "Mask":
        # Should its own elements ever be seen, then they hide everything, and no model gives sense.
        made: Mask = torch.full((1, 1, 1, 1), _hidden(dtype), dtype=dtype, device=device).expand(*size).as_subclass(cls)
        made.window, made.keys, made.sequences, made.blocks = window, keys, sequences, blocks
        made._matrix, made._starts = None, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with _torch.plain_functions():
            if func not in _ABOUT:
                args, kwargs = _torch.tree_map_only(Mask, Mask.matrix, (args, kwargs))
            return func(*args, **(kwargs or {}))

    def matrix(self) -> Tensor:
        """The mask itself, made when it is first needed."""
        if self._matrix is None:
            batch, _, length_q, length_k = self.shape
            diagonal = torch.arange(length_q, device=self.device)[:, None] + (length_k - length_q)
            key = torch.arange(length_k, device=self.device)
            if self.blocks is None:
                seen = torch.ones((1, 1, length_q, length_k), dtype=torch.bool, device=self.device)
            else:
                seen = self.blocks.to_dense()
            left, right = self.window
            if left is not None:
                seen = seen & (key >= diagonal - left)
            if right is not None:
                seen = seen & (key <= diagonal + right)
            if self.keys is not None:
                seen = seen & self.keys
            if self.sequences is not None:
                seen = seen & (self.sequences[:, None, :, None] == self.sequences[:, None, None])
            if self.dtype != torch.bool:
                seen = torch.where(seen, torch.zeros((), dtype=self.dtype, device=self.device), _hidden(self.dtype))
            self._matrix = seen.expand(batch, -1, -1, -1)
        return self._matrix

    def starts(self, others: Tensor | None) -> Tensor:
        """cu_seqlens int32 [N+1] of its rows, of their `sequences`, and of `others`, if there are any: flat, as one."""
        if self._starts is None or self._starts[0] is not others:
            begins = torch.zeros((self.shape[0], self.shape[2]), dtype=torch.bool, device=self.device)
            begins[:, 0] = True
            if self.sequences is not None:
                begins[:, 1:] = self.sequences[:, 1:] != self.sequences[:, :-1]
            starts = torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([begins.numel()], device=begins.device)])
            if others is not None:
                starts = torch.cat([starts, others.to(starts)]).unique()
                starts = starts[starts <= others[-1]]
            self._starts = others, starts.to(torch.int32)
        return self._starts[1]


_PROPERTIES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "is_leaf"),
    *("is_nested", "is_sparse", "is_quantized", "is_mkldnn"),
)
_ABOUT = {  # what is asked about a mask, not done to it; most of it by torch.compile, of what a compiled layer gets
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage),
    *(Tensor.is_conj, Tensor.is_neg, *_torch.about_views),
}


def _hidden(dtype: torch.dtype) -> float:
    return False if dtype == torch.bool else torch.finfo(dtype).min


def mask(**terms: Any) -> Tensor | None:
    """transformers' mask interface: what each query may see.

    Args:
        terms: those of `transformers.masking_utils.sdpa_mask` and `eager_mask`, and the model's config.

    Returns:
        A `Mask`, or what transformers' own function returns: `sdpa_mask`, whose None `attention` takes as sdpa does;
        for a model that knows eager attention only `eager_mask`, and never None.

    Raises:
        NotImplementedError: the model computes attention by itself.
    """
    config = terms.get("config")
    by_itself = None if config is None else attends_by_itself(type(config))
    if config is not None and by_itself is not None:
        refuse(config._attn_implementation, f"{by_itself}, which doesn't use transformers' attention interface")
    eager_only = config is not None and is_eager_only(type(config))
    is_tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    # Not while torch.compile traces a model: how large a packed mask is, its contents say. To wait for them breaks the
    # graph. With room for all that it may be, it has a bit per score; and since a graph has a symbol for the number of
    # queries, they can't be asked 128 at a time, so that Lq x Lk is made. Compiled layers get their mask from outside.
    # For a single query sdpa_mask has None or a row of keys already. A static cache's q_offset is the device's to know.
    is_worth_it = terms.get("q_length", 1) > 1 or (eager_only and not isinstance(terms.get("q_offset"), Tensor))
    if is_worth_it and not is_tracing:
        as_dtype = terms.get("dtype", torch.float32) if eager_only else torch.bool
        reach = _reach(terms.get("mask_function", hf.causal_mask_function))
        if reach is not None and (reach.sequences is not None or not reach.is_remapped):
            return _lazy_mask(reach, as_dtype, **terms)
        if min(terms["q_length"], terms["kv_length"]) >= LONG:
            return _blocks(as_dtype, **terms)
    dense: Tensor | None
    if eager_only:
        dense = hf.eager_mask(**{**terms, "allow_is_bidirectional_skip": False})
        return dense
    if getattr(config, "num_kv_shared_layers", 0):  # Gemma 4 may drop queries, and then needs the mask
        terms["allow_is_causal_skip"] = False
    dense = hf.sdpa_mask(**terms)
    return dense


class _Reach(NamedTuple):
    """How far (back, ahead) of its own position a query sees, and which sequences [B,L] it doesn't leave."""

    back: int | None = None
    ahead: int | None = None
    sequences: Tensor | None = None
    is_remapped: bool = False  # positions count within a sequence, where distances are the same


def _lazy_mask(
    reach: _Reach,
    as_dtype: torch.dtype,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """What `_reach` knows of a mask's function, and its padding."""
    # Positions are absolute, windows relative to the lower right.
    shift = int(q_offset) - kv_offset - (kv_length - q_length)
    left = reach.back if reach.back is None else reach.back - shift
    right = reach.ahead if reach.ahead is None else reach.ahead + shift
    # From such bounds on they hide nothing.
    left = None if left is not None and left >= kv_length - 1 else left
    right = None if right is not None and right >= q_length - 1 else right
    keys = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        visible = keys if right is None else keys[:, : max(0, kv_length + right)]
        keys = None if visible.all() else keys[:, None, None]
    return Mask.of((batch_size, 1, q_length, kv_length), device, (left, right), keys, reach.sequences, as_dtype)


def _blocks(
    as_dtype: torch.dtype,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """What a function says that no `_Reach` can, and the padding."""
    keys = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        mask_function = hf.and_masks(mask_function, hf.padding_mask_function(keys.to(torch.bool)))
    shape = (batch_size, 1, q_length, kv_length)
    packed = PackedBlockMask.of(lambda b, h, q, k: mask_function(b, h, q + q_offset, k + kv_offset), shape, device)
    return Mask.of(shape, device, (None, None), None, None, as_dtype, packed)


# A mask function is a closure; those with the same code say the same. Not all are in transformers 5.0.
_AND = hf.and_masks().__code__
_KNOWN: dict[Any, Callable[..., "_Reach | None"]] = {
    getattr(hf, name)(*(None,) * count).__code__: reach
    for name, count, reach in (
        ("sliding_window_overlay", 1, lambda size: _Reach(back=size - 1)),
        ("sliding_window_bidirectional_overlay", 1, lambda size: _Reach(size, size)),
        ("packed_sequence_mask_function", 1, lambda sequences: _Reach(sequences=sequences)),
        ("remap_positions_for_packed_sequence", 2, lambda function, positions: _remapped(_reach(function))),
    )
    if hasattr(hf, name)
}


def _remapped(reach: "_Reach | None") -> "_Reach | None":
    return reach and reach._replace(is_remapped=True)


def _reach(function: Callable[..., Any]) -> "_Reach | None":
    """None if `function` says anything that a `_Reach` can't."""
    if function is hf.causal_mask_function:
        return _Reach(ahead=0)
    if function is hf.bidirectional_mask_function:
        return _Reach()
    code = getattr(function, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if code in _KNOWN:
        return _KNOWN[code](*cells)
    if code is not _AND:
        return None
    back, ahead, sequences, is_remapped = _Reach()
    for part in cells[0]:
        reach = _reach(part)
        if reach is None or (sequences is not None and reach.sequences is not None):
            return None
        back, ahead = _least(back, reach.back), _least(ahead, reach.ahead)
        sequences = reach.sequences if sequences is None else sequences
        is_remapped = is_remapped or reach.is_remapped
    return _Reach(back, ahead, sequences, is_remapped)


def _least(a: int | None, b: int | None) -> int | None:
    return min((bound for bound in (a, b) if bound is not None), default=None)
