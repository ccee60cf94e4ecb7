"""Attention on ATen for CPU tensors: blockwise, O(L) memory, every feature, float16 to float64.

    for each chunk of heads:                      only as many as fit the scratch budget
        for each block of query rows:             rows that see no key are never visited
            keys <- those that some row sees      what a window hides costs nothing
            mask <- window + bias + ALiBi         None where every row sees every key
            out, lse <- softmax(scale * Q K' + mask) V

A block is ATen's own fused kernel, or, with a softcap or dropout, three matrix operations. Half types are computed in
float32, chunk by chunk, and are exact to the last rounding; but in their own type, which AMX makes fast, where one call
of ATen's kernel does it all (`_attend_plainly`) and only `out` is wanted.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _log
from .._arguments import Dense
from .blocks import HIDDEN, Band, Block, Cut, Terms, Window
from .dropout import COPIES, Dropout
from .layout import empty_correction, empty_outputs, heads_are_batches, is_transposed, laid_out, lost_to_rounding
from .listed import ListedMask

# From so many numbers on, ATen's kernel for half types, which rounds P, is within the numerics rule: at most 0.8 of it.
# The largest error of few numbers may be small by chance in the SDPA that the rule compares with.
_MANY = 4096

# Under so many a copy of out takes less time than views of all tensors, 3 us against 14.
_FEW = 1 << 14

# Keys that ATen's kernel takes at a time.
_VECTOR = 16

# Terms that `_summed_in_parts` adds one by one.
_PART = 32

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attention_forward(
    arguments: Dense,
    *,
    first_batch: int = 0,
    correction: Tensor | None = None,
    exact_lse: bool = True,
    trains: bool = True,
) -> tuple[Tensor, Tensor]:
    """`mfa::attention_forward` for CPU tensors. The caller has checked the arguments.

    Args:
        arguments: float16, bfloat16, float32 or float64; the bias is never expanded.
        first_batch: what dropout counts batches from.
        correction: zeros of `empty_correction`; gets what rounding takes from out.
        exact_lse: whether lse obeys the numerics rule, too. ATen's kernel for half types has it to 1e-4 only.
        trains: whether a backward pass may follow.

    Returns:
        out [B,Hq,Lq,Dv] and lse float32 [B,Hq,Lq], strided as `empty_outputs` says.
    """
    query, key, value = arguments.query, arguments.key, arguments.value
    sinks, scale, softcap = arguments.sinks, arguments.scale, arguments.softcap
    listed_only = arguments.block_mask is not None
    is_plain = arguments.bias is sinks is arguments.alibi_slopes is arguments.rng_state is None and softcap == 0
    if is_plain and not listed_only and (correction is None or correction.numel() == 0):
        found = _attend_plainly(arguments, exact_lse, trains)
        if found is not None:
            return found

    batch, query_heads, query_length, dim = query.shape
    key_heads, value_dim = key.shape[1], value.shape[3]
    window = Window.of(query_length, key.shape[2], arguments.window_left, arguments.window_right)
    visible = window.rows()
    keys = window.keys(visible)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # ATen's kernel takes grouped heads (since torch 2.9), and one width for D and Dv.
    dropout = Dropout.of(arguments, first_batch)
    fused = softcap == 0 and dropout is None
    terms = Terms(window, arguments.bias, slopes_of(arguments.alibi_slopes, query_heads, dtype), dtype)
    whole, causal = terms.as_one_block(scale) if fused and not listed_only else (False, False)
    width, value_width = (max(dim, value_dim),) * 2 if fused else (dim, value_dim)
    operands = ((query, width), (key, width), (value, value_width))
    copied = any(is_copied(tensor, dtype, columns) for tensor, columns in operands)
    out, lse = empty_outputs(query, value_dim)
    if listed_only or visible.stop - visible.start < query_length:  # the other rows see nothing
        unseen = [slice(None)] if listed_only else [slice(0, visible.start), slice(visible.stop, None)]
        for rows in unseen:
            out[:, :, rows] = 0
            lse[:, :, rows] = HIDDEN if sinks is None else sinks[:, None].to(lse.dtype)
    if lse.numel() == 0 or visible.start == visible.stop:
        return out, lse

    # Copies are made of a chunk's tensors, or, where a block sees but a small part of them, of that part.
    group, block_rows = query_heads // key_heads, window.block_rows()
    banded = fused and not whole and terms.bias is None and not listed_only
    local = copied and not whole and not banded and 2 * window.block_keys(block_rows) <= key.shape[2]
    lengths = (block_rows, window.block_keys(block_rows)) if local else (query_length, key.shape[2])
    operand_bytes = (width + value_width) * (group * lengths[0] + lengths[1]) * dtype.itemsize if copied else 0
    cut = Cut.of(terms, batch, key_heads, group, operand_bytes, (not fused) + (0 if dropout is None else COPIES))
    alike = 1
    if banded:
        cut, alike = cut.banded(2 * group * block_rows * width * dtype.itemsize)

    chunks: Iterable[tuple[slice, slice, slice, Iterable[Block]]]
    if arguments.block_mask is not None:
        chunks = ListedMask(arguments.block_mask, window).chunks(cut)
    else:
        chunks = ((*chunk, [Band(visible, keys)] if whole else cut.bands(alike)) for chunk in cut.chunks())
    for batches, heads, q_heads, blocks in chunks:
        chunk = query[batches, q_heads], key[batches, heads], value[batches, heads]
        targets = out[batches, q_heads], lse[batches, q_heads]
        if not local:
            chunk = _operands(*chunk, dtype, width, value_width)
        for block in blocks:
            mask = None if whole else terms.of_block(batches, q_heads, block)
            q, k, v = block.of_rows(chunk[0]), block.of_keys(chunk[1]), block.of_keys(chunk[2])
            if local:
                q, k, v = _operands(q, k, v, dtype, width, value_width)
            factors = None if dropout is None else dropout.of_block(batches, q_heads, block.rows, block.spans)
            q, _, block_scale = exactly_scaled(q, scale) if fused and trains else (q, 1.0, scale)
            if fused and mask is None:
                block_out, block_lse = _attend_as_laid_out(q, k, v, block_scale, causal)
            else:
                block_out, block_lse = _attend(q, k, v, mask, block_scale, softcap, causal, factors)
            if sinks is not None:
                block_out, block_lse = _with_sinks(block_out, block_lse, sinks[q_heads, None])
            block_out = block_out[..., :value_dim]
            rounded = block.of_rows(targets[0]).copy_(block_out)
            if correction is not None and correction.numel():
                block.of_rows(correction[batches, q_heads]).copy_(lost_to_rounding(block_out, rounded))
            block.of_rows(targets[1]).copy_(block_lse)
    return out, lse


def attention_forward_with_correction(arguments: Dense) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_forward`, and what rounding took from out: see `empty_correction`."""
    correction = empty_correction(empty_outputs(arguments.query, arguments.value.shape[3])[0]).zero_()
    return *attention_forward(arguments, correction=correction), correction


def slopes_of(alibi_slopes: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    return None if alibi_slopes is None else alibi_slopes.reshape(-1, heads, 1, 1).to(dtype)


def _attend_plainly(arguments: Dense, exact_lse: bool, trains: bool) -> tuple[Tensor, Tensor] | None:
    """What most calls ask for, in one call of ATen's kernel, on tensors as they are; None for anything else.

    In a short call Python is felt: all of it together takes up to a tenth as long as L 512 in bfloat16.
    """
    query, key, value, scale = arguments.query, arguments.key, arguments.value, arguments.scale
    window_right = arguments.window_right
    batch, heads, length, dim = query.shape
    causal = window_right is not None
    if arguments.window_left is not None or (causal and (window_right != length - key.shape[2] or scale <= 0)):
        return None
    is_half = query.dtype.itemsize == 2
    if value.shape[3] != dim or (is_half and (exact_lse or batch * heads * length * dim < _MANY)):
        return None
    if query.numel() == 0 or key.numel() == 0:
        return None
    rows_are_contiguous = query.stride(3) == key.stride(3) == value.stride(3) == 1
    if not (rows_are_contiguous or is_half):
        return None
    if causal and length < key.shape[2]:
        key, value = key[:, :, :length], value[:, :, :length]  # no row sees the others
    first, _, scale = exactly_scaled(query, scale) if trains else (query, 1.0, scale)
    try:
        if rows_are_contiguous:
            out, lse = _attend_as_laid_out(first, key, value, scale, causal)
        else:  # copied, small as they are, so that results don't depend on the layout
            out, lse = _attend_as_laid_out(first.contiguous(), key.contiguous(), value.contiguous(), scale, causal)
    except RuntimeError as error:
        if not is_half:
            raise
        # ATEN_CPU_CAPABILITY keeps instructions from ATen that oneDNN, and ATen's kernel by it, counts on.
        _log.once(f"half types are computed in float32, since ATen's kernel for them fails: {error}")
        return None
    # contiguous() leaves the strides of dimensions of size 1 as they are.
    return laid_out(out, query), lse.to(torch.float32).flatten().view(lse.shape)


def _attend_as_laid_out(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The whole problem as one block. ATen's kernel makes B,L,H,D; where B,H,L,D is wanted, heads become batches.

    Of few numbers a copy is made: that takes less time than the views.
    """
    heads = query.shape[1]
    tensors = (query, key, value)
    if (
        query.numel() < _FEW
        or key.shape[1] != heads
        or is_transposed(query)
        or not all(map(heads_are_batches, tensors))
    ):
        out, lse = _attend(query, key, value, None, scale, 0, causal)
        return laid_out(out, query), lse
    folded = [tensor.view(-1, 1, *tensor.shape[2:]) for tensor in tensors]
    out, lse = _attend(folded[0], folded[1], folded[2], None, scale, 0, causal)
    if out.dtype != query.dtype:  # scores that overflow make it float64
        out = out.to(query.dtype)
    return out.view(*query.shape[:3], -1), lse.view(query.shape[:3])


def is_copied(tensor: Tensor, dtype: torch.dtype, width: int) -> bool:
    return tensor.dtype != dtype or tensor.shape[-1] != width or tensor.stride(-1) != 1


def exactly_scaled(query: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """`query * factor`, the factor, and the power of two that is left of the scale: for ATen's kernels, in training.

    The one for the backward pass computes scores again, to take exp(score - lse). It lets BLAS multiply by the scale,
    the one for the forward pass does so itself: only a power of two makes both round alike. Otherwise P, where few keys
    share a row, feels the rounding of scores, which softmax on whole rows doesn't.
    """
    factor = math.frexp(scale)[0]
    if abs(factor) in (0, 0.5):
        return query, 1.0, scale
    return query * factor, factor, scale / factor


def _operands(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in `dtype`, rows contiguous and padded with zeros (ATen's kernel assumes all that)."""
    return operand(query, dtype, width), operand(key, dtype, width), operand(value, dtype, value_width)


def operand(tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    if tensor.shape[-1] == width:
        operand = tensor.to(dtype)
        return operand if operand.stride(-1) == 1 else operand.contiguous()
    operand = torch.zeros((*tensor.shape[:-1], width), dtype=dtype)
    operand[..., : tensor.shape[-1]] = tensor
    return operand


def grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """[B,Hq,rows,X] as [B,Hkv,Hq/Hkv*rows,X]: the heads of a group then share a key without a copy of it."""
    return tensor.reshape(tensor.shape[0], key_heads, -1, tensor.shape[-1])


def raw_scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap(scale * Q K') [B,Hq,rows,keys]."""
    rows, columns = grouped(query * scale, key.shape[1]), key.transpose(-1, -2)
    scores = _summed_in_parts(rows, columns) if query.shape[2] == 1 < rows.shape[2] else rows @ columns
    if softcap > 0:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.view(*query.shape[:3], key.shape[2])


def _summed_in_parts(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in some more time, as exact as if each row had a product of its own.

    A BLAS adds the terms of a single row in parts, those of a matrix one by one; and where a head has one query, the
    numerics rule compares with single rows.
    """
    shape = (*left.shape[:-1], right.shape[-1])
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    parts = zip(left.split(_PART, -1), right.split(_PART, -2), strict=True)
    total = torch.bmm(*next(parts))
    for part in parts:
        total.baddbmm_(*part)
    return total.view(shape)


def _softmax_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = raw_scores(query, key, scale, softcap)
    if mask is not None:
        scores += mask
    maximum = scores.amax(-1, keepdim=True)
    maximum.masked_fill_(maximum == HIDDEN, 0)
    total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
    if factors is not None:
        scores *= factors
    out = (grouped(scores, key.shape[1]) @ value).view(*query.shape[:3], value.shape[3])
    return out.div_(total.masked_fill(total == 0, 1)), maximum.add_(total.log_()).squeeze(-1)


def _fused_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:  # ATen reports 0 for a row that sees nothing
        lse = lse.masked_fill(mask.amax(-1) == HIDDEN, HIDDEN)
    if key.shape[2] < _VECTOR and not lse.all():  # ... and for one whose scores are all NaN, if there are so few
        scores = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), 0)
        if mask is not None:
            scores = scores.masked_fill(mask == HIDDEN, 0)
        lost = scores.isnan().any(-1)
        out, lse = out.masked_fill(lost.unsqueeze(-1), math.nan), lse.masked_fill(lost, math.nan)
    return out, lse


def overflows(query: Tensor, key: Tensor) -> bool:
    """Whether q.k may leave float32 although q and k are finite."""
    if query.numel() == 0 or key.numel() == 0:
        return False
    query_bound, key_bound = (max(abs(float(bound)) for bound in torch.aminmax(tensor)) for tensor in (query, key))
    return torch.finfo(torch.float32).max < query_bound * key_bound * query.shape[-1] < math.inf


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One block. Scores that leave float32 before they are scaled are computed again in float64.

    Args:
        factors: what dropout multiplies probabilities by, [B,Hq,rows,keys].
    """
    if softcap > 0 or factors is not None:
        out, lse = _softmax_block(query, key, value, mask, scale, softcap, factors)
    else:
        out, lse = _fused_block(query, key, value, mask, scale, causal)
    may_overflow = query.dtype not in (torch.float16, torch.float64)
    if may_overflow and not math.isfinite(lse.sum()) and overflows(query, key):
        mask, factors = (None if tensor is None else tensor.double() for tensor in (mask, factors))
        return _attend(query.double(), key.double(), value.double(), mask, scale, softcap, causal, factors)
    return out, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with one more logit, `sinks` [heads,1], in the softmax's denominator."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    share = torch.exp(lse - total).masked_fill_(lse == HIDDEN, 0)
    return out * share[..., None], total
