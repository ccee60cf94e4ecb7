"""Rotary embeddings (Su et al. 2021) by PyTorch's operations: flash_attn.layers.rotary, flash_attn.ops.triton.rotary.

A pair (a, b) of a token at position p becomes (a cos[p] - b sin[p], a sin[p] + b cos[p]), in float32 (float64 for
float64), rounded once. Interleaved pairs are dimensions 2i and 2i+1 (GPT-J), the others i and i+R/2 (GPT-NeoX); what
lies behind dimension R stays.
"""

import itertools

import torch
from torch import Tensor

from .._checks.indices import host_values

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first R dimensions of every head. Differentiable.

    Args:
        x: [B,L,H,D], or with cu_seqlens [T,H,D]; modified with `inplace`.
        cos, sin: [positions,R/2], R <= D.
        seqlen_offsets: position of a sequence's first token: one integer, or int [B].
        cu_seqlens: int32 [N+1]: where packed sequences start and end.
        max_seqlen: changes nothing.
        interleaved: which dimensions make a pair.
        conjugate: turns the other way.

    Returns:
        x itself with `inplace`, or a tensor like it.

    Raises:
        ValueError: shapes that don't agree; where the host can see them, positions that the tables don't have. On a GPU
            those are clamped.
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens)
    dim = 2 * cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = _rows(x, cos.shape[0], seqlen_offsets, cu_seqlens)
    cosines, sines = (table[rows].to(wide).unsqueeze(-2) for table in (cos, sin))  # of all heads
    if conjugate:
        sines = -sines
    sizes, pair = ((dim // 2, 2), -1) if interleaved else ((2, dim // 2), -2)
    first, second = x[..., :dim].unflatten(-1, sizes).to(wide).unbind(pair)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    rotated = torch.stack(turned, pair).flatten(-2).to(x.dtype)
    if inplace:
        x[..., :dim].copy_(rotated)
        return x
    return torch.cat((rotated, x[..., dim:]), -1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary`, with its arguments in another order."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates queries and keys in place.

    Args:
        qkv: [B,L,3,H,D], or with num_heads_q [B,L,Hq+2*Hkv,D]; modified.
        cos, sin, interleaved, seqlen_offsets: as in `apply_rotary`.
        cos_k, sin_k: of keys, where they differ (xPos).
        num_heads_q: Hq.

    Returns:
        qkv itself.
    """
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        queries, keys = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.dim() == 4 and num_heads_q is not None and qkv.shape[2] > num_heads_q:
        queries, keys = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (num_heads_q + qkv.shape[2]) // 2]
    else:
        shapes = "[B,L,3,H,D], or with num_heads_q [B,L,Hq+2*Hkv,D]"
        raise ValueError(f"qkv has shape {list(qkv.shape)}, num_heads_q is {num_heads_q}; it must have shape {shapes}")
    tables = (cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    for x, (cosines, sines) in zip((queries, keys), tables, strict=True):
        apply_rotary(x, cosines, sines, seqlen_offsets, interleaved=interleaved, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotates the keys of kv [B,L,2,H,D] in place, and returns it; the others as in `apply_rotary`."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv has shape {list(kv.shape)}; it must have shape [B,L,2,H,D]")
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotary embeddings whose tables grow with the positions that calls need; with scale_base xPos (Sun et al. 2022).

    Args:
        dim: R.
        base: pair i turns by base**(-2i/R) radians per token.
        interleaved: which dimensions make a pair.
        scale_base: after how many tokens xPos scales by another power; None is without it.
        device: of the frequencies.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        scale = None if scale_base is None else (steps + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        # Under these names models fetch the tables for flash_attn_with_kvcache.
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (steps / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes tables of `seqlen` positions, unless there are."""
        table = self._cos_cached
        if (
            table is not None
            and seqlen <= self._seq_len_cached
            and (table.device, table.dtype) == (device, dtype)
            and not (self.training and table.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # In float32 also where the module is in 16 bits: angles of late positions would lose all of their digits.
        frequencies = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._frequencies(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * frequencies.to(device)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale.to(device, torch.float32) ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place.

        Args:
            qkv: as in `apply_rotary_emb_qkv_`; with kv the queries, [B,L,Hq,D]. Modified.
            kv: [B,L,2,Hkv,D]; modified.
            seqlen_offset: as seqlen_offsets in `apply_rotary`. If a tensor, max_seqlen must have been given once.
            max_seqlen: how many positions the tables need; None is L + seqlen_offset.
            num_heads_q: as in `apply_rotary_emb_qkv_`.

        Returns:
            qkv, or with kv both.
        """
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError(
                "max_seqlen is None; it must be given when seqlen_offset is a tensor, and there is no table"
            )
        if kv is None:
            keys = (self._cos_k_cached, self._sin_k_cached)
            return apply_rotary_emb_qkv_(qkv, cos, sin, *keys, self.interleaved, seqlen_offset, num_heads_q)
        apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        if self._cos_k_cached is not None and self._sin_k_cached is not None:
            cos, sin = self._cos_k_cached, self._sin_k_cached
        return qkv, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)


def _check(x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> None:
    if x.dim() != (4 if cu_seqlens is None else 3):
        layout = "[B,L,H,D]" if cu_seqlens is None else "[T,H,D] with cu_seqlens"
        raise ValueError(f"x has shape {list(x.shape)}; it must have shape {layout}")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offsets, Tensor) and offsets.shape != (sequences,):
        raise ValueError(f"seqlen_offsets has shape {list(offsets.shape)}; it must have shape [B] = [{sequences}]")
    if cos.dim() != 2:
        raise ValueError(f"cos has shape {list(cos.shape)}; it must have shape [positions,R/2]")
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {list(sin.shape)}; it must have that of cos, {list(cos.shape)}")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos has {cos.shape[1]} columns; they must be at most half of x's head dimension {x.shape[-1]}"
        )


def _rows(x: Tensor, positions: int, offsets: int | Tensor, cu_seqlens: Tensor | None) -> slice | Tensor:
    """Of the tables: a slice that all sequences have, or int64 [B,L] or [T]."""
    if cu_seqlens is None:
        lengths: list[int] | None = [x.shape[1]] * x.shape[0]
    else:
        starts = host_values(cu_seqlens)
        lengths = None if starts is None else [end - start for start, end in itertools.pairwise(starts)]
    known = host_values(offsets) if isinstance(offsets, Tensor) else [offsets] * len(lengths or ())
    for first, length in zip(known or (), lengths or (), strict=False):
        if not 0 <= first <= positions - length:
            raise ValueError(
                f"seqlen_offsets has {first} for a sequence of {length} tokens; cos must have their positions, and has "
                f"0 ... {positions - 1}"
            )
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True).clamp_max(cu_seqlens.shape[0] - 2)
        rows = tokens - cu_seqlens[sequence] + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)
    elif isinstance(offsets, Tensor):
        rows = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        return slice(offsets, offsets + x.shape[1])
    return rows.long().clamp(0, positions - 1)
