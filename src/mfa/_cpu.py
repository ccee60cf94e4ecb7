"""Attention on ATen for CPU tensors: blockwise, O(L) memory, every feature, float16 to float64.

    for each chunk of heads:                      only as many as fit the scratch budget
        for each block of query rows:             rows that see no key are never visited
            keys <- those that some row sees      what a window hides costs nothing
            mask <- window + bias + ALiBi         None where every row sees every key
            out, lse <- softmax(scale * Q K' + mask) V

A block is ATen's own fused kernel, or, with a softcap or dropout, three matrix operations. Half types are computed in
float32, chunk by chunk: as fast as ATen's half kernels without AMX, and exact to the last rounding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._blocks import HIDDEN, Cut, Terms, Window, part
from ._dropout import COPIES, Dropout

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def empty_outputs(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised `out` [B,Hq,Lq,Dv] and `lse` float32 [B,Hq,Lq], laid out as every backend lays them out.

    Both are contiguous, except that `out` is B,L,H,D in memory when the query is.
    """
    batch, heads, length, _ = query.shape
    if _is_transposed(query):
        out = query.new_empty((batch, length, heads, value_dim)).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, length, value_dim))
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


def empty_gradients(query: Tensor, others: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of the query and other inputs; shape [0] for what isn't wanted."""
    return tuple(
        tensor.new_empty(tensor.shape) if asked and tensor is not None else query.new_empty(0)
        for tensor, asked in zip((query, *others), wanted, strict=True)
    )


def _is_transposed(query: Tensor) -> bool:
    return query.shape[1] > 1 and query.shape[2] > 1 and query.stride(1) < query.stride(2)


def _laid_out(out: Tensor, query: Tensor) -> Tensor:
    """`out` with the strides that `empty_outputs` gives it: itself if it has them, or else a copy."""
    _, heads, length, dim = out.shape
    row, head = (heads * dim, dim) if _is_transposed(query) else (dim, length * dim)
    if out.dtype == query.dtype and out.stride() == (heads * length * dim, head, row, 1):
        return out
    return empty_outputs(query, dim)[0].copy_(out)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float = 0,
    rng_state: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """`mfa::attention_forward` for CPU tensors. The caller has checked the arguments.

    Args:
        query: [B,Hq,Lq,D], any strides; float16, bfloat16, float32 or float64.
        key, value: [B,Hkv,Lk,D] and [B,Hkv,Lk,Dv].
        bias: bool (True = attend) or floating, 4 dimensions, each 1 or that of [B,Hq,Lq,Lk]; never expanded.
        sinks: [Hq]. alibi_slopes: [Hq] or [B,Hq].
        window_left, window_right: relative to the lower-right diagonal, None = open.
        rng_state: int64 [2], what dropout starts from (_dropout.py); it counts batches from `first_batch`.

    Returns:
        out [B,Hq,Lq,Dv] and lse float32 [B,Hq,Lq], strided as `empty_outputs` says.
    """
    batch, query_heads, query_length, dim = query.shape
    key_heads, value_dim = key.shape[1], value.shape[3]
    window = Window.of(query_length, key.shape[2], window_left, window_right)
    visible = window.rows()
    keys = window.keys(visible)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # ATen's kernel takes grouped heads (since torch 2.9), and one width for D and Dv.
    dropout = Dropout.of(rng_state, dropout_p, query_heads, dtype, first_batch)
    fused = softcap == 0 and dropout is None
    width, value_width = (max(dim, value_dim),) * 2 if fused else (dim, value_dim)
    operands = ((query, width), (key, width), (value, value_width))
    copied = any(_is_copied(tensor, dtype, columns) for tensor, columns in operands)
    # One block is all, if nothing has to be added to its scores (ATen multiplies its causal -inf by the scale).
    plain = bias is None and alibi_slopes is None and fused
    causal = plain and scale > 0 and window.is_causal(visible.start)
    whole = causal or (plain and not window.hides(visible, keys))
    all_rows = visible.stop - visible.start == query_length
    if whole and not copied and sinks is None and all_rows and batch * query_heads * query_length > 0:
        if keys.stop - keys.start != key.shape[2]:
            key, value = key[:, :, keys], value[:, :, keys]
        out, lse = _attend_as_laid_out(query, key, value, scale, causal)
        return out, lse.to(torch.float32).contiguous()

    out, lse = empty_outputs(query, value_dim)
    if not all_rows:  # the others see nothing
        for rows in (slice(0, visible.start), slice(visible.stop, None)):
            out[:, :, rows] = 0
            lse[:, :, rows] = HIDDEN if sinks is None else sinks[:, None].to(lse.dtype)
    if lse.numel() == 0 or visible.start == visible.stop:
        return out, lse

    # Copies are made of a chunk's tensors, or, where a block sees but a small part of them, of that part.
    group, block_rows = query_heads // key_heads, window.block_rows()
    local = copied and not whole and 2 * window.block_keys(block_rows) <= key.shape[2]
    lengths = (block_rows, window.block_keys(block_rows)) if local else (query_length, key.shape[2])
    operand_bytes = (width + value_width) * (group * lengths[0] + lengths[1]) * dtype.itemsize if copied else 0
    terms = Terms(window, bias, _slopes(alibi_slopes, query_heads, dtype), dtype)
    cut = Cut.of(terms, batch, key_heads, group, operand_bytes, (not fused) + (0 if dropout is None else COPIES))

    for batches, heads, q_heads in cut.chunks():
        chunk = query[batches, q_heads], key[batches, heads], value[batches, heads]
        if not local:
            chunk = _operands(*chunk, dtype, width, value_width)
        for rows, columns in [(visible, keys)] if whole else cut.blocks():
            mask = None if whole else terms.mask(batches, q_heads, rows, columns)
            block = chunk[0][:, :, rows], chunk[1][:, :, columns], chunk[2][:, :, columns]
            if local:
                block = _operands(*block, dtype, width, value_width)
            factors = None if dropout is None else dropout.factors(batches, q_heads, rows, columns)
            block_out, block_lse = _attend(*block, mask, scale, softcap, causal, factors)
            if sinks is not None:
                block_out, block_lse = _with_sinks(block_out, block_lse, sinks[q_heads, None])
            out[batches, q_heads, rows] = block_out[..., :value_dim]
            lse[batches, q_heads, rows] = block_lse
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    output_mask: Sequence[bool],
    dropout_p: float = 0,
    rng_state: Tensor | None = None,
    first_batch: int = 0,
) -> list[Tensor | None]:
    """Gradients of `attention_forward` in O(L) memory: scores are computed again, block by block.

        P = softmax(S),  dP = dO V',  delta = rowsum(P * dP) - dLSE,  dS = P * (dP - delta)
        dQ = scale dS K,  dK = scale dS' Q,  dV = P' dO,  dbias = dS,  dsink = -sum P(sink) delta

    A block has whole rows of S, so the results of the forward pass, and their rounding, aren't needed. Dropout
    multiplies dP, and the P of dV, by the factors that the forward pass had.

    Args:
        grad_out: [B,Hq,Lq,Dv]. grad_lse: float32 [B,Hq,Lq]. The rest as in `attention_forward`.
        output_mask: which of the six gradients are wanted.

    Returns:
        Gradients of query, key, value, bias, sinks, alibi_slopes, each in its tensor's shape and dtype, contiguous;
        None for one that isn't wanted, or whose tensor wasn't given.
    """
    batch, query_heads, query_length, dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    inputs = (query, key, value, bias, sinks, alibi_slopes)
    # Sums are kept in the dtype of the scores until the end; those of key and value only for a chunk.
    grad_query, grad_key, grad_value, grad_bias, grad_sinks, grad_slopes = grads = [
        torch.zeros(tensor.shape, dtype=tensor.dtype if index < 3 else dtype) if wanted and tensor is not None else None
        for index, (tensor, wanted) in enumerate(zip(inputs, output_mask, strict=True))
    ]
    window = Window.of(query_length, key_length, window_left, window_right)
    terms = Terms(window, bias, _slopes(alibi_slopes, query_heads, dtype), dtype)

    group = query_heads // max(1, key_heads)
    operand_bytes = (2 * (dim + value_dim) * (group * query_length + key_length)) * dtype.itemsize
    dropout = Dropout.of(rng_state, dropout_p, query_heads, dtype, first_batch)
    cut = Cut.of(terms, batch, key_heads, group, operand_bytes, 4 if dropout is None else 5 + COPIES)
    if grad_sinks is not None and grad_lse is not None:  # the lse of a row that sees no key is the sink
        visible = window.rows()
        grad_sinks += grad_lse.sum((0, 2)) - grad_lse[:, :, visible].sum((0, 2))
    for batches, heads, q_heads in cut.chunks() if grad_out.numel() else ():
        q, d_out = query[batches, q_heads].to(dtype), grad_out[batches, q_heads].to(dtype)
        k, v = key[batches, heads].to(dtype), value[batches, heads].to(dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in cut.blocks():
            raw = _scores(q[:, :, rows], k[:, :, keys], scale, softcap)
            mask = terms.mask(batches, q_heads, rows, keys)
            scores = raw if mask is None else raw + mask
            probability, share = _softmax(scores, None if sinks is None else sinks[q_heads, None, None].to(dtype))
            d_rows = _grouped(d_out[:, :, rows], k.shape[1])
            factors = None if dropout is None else dropout.factors(batches, q_heads, rows, keys)
            kept = probability if factors is None else probability * factors
            dv[:, :, keys] += _grouped(kept, k.shape[1]).transpose(-1, -2) @ d_rows
            d_scores = (d_rows @ v[:, :, keys].transpose(-1, -2)).view(scores.shape)
            if factors is not None:
                d_scores *= factors
            delta = (probability * d_scores).sum(-1, keepdim=True)
            if grad_lse is not None:
                delta -= grad_lse[batches, q_heads, rows, None]
            d_scores.sub_(delta).mul_(probability)
            if grad_sinks is not None:
                grad_sinks[q_heads] -= (share * delta).sum((0, 2, 3))
            if grad_bias is not None:
                target = part(grad_bias, batches, q_heads, rows, keys)
                target += d_scores.sum_to_size(target.shape)
            if grad_slopes is not None:
                slopes = grad_slopes.view(-1, query_heads)
                target = part(slopes, batches)[:, q_heads]
                target -= (d_scores * terms.distances(rows, keys).abs_()).sum((-1, -2)).sum_to_size(target.shape)
            if softcap > 0:
                d_scores *= 1 - (raw / softcap).square_()
            d_grouped = _grouped(d_scores.mul_(scale), k.shape[1])
            dk[:, :, keys] += d_grouped.transpose(-1, -2) @ _grouped(q[:, :, rows], k.shape[1])
            if grad_query is not None:
                grad_query[batches, q_heads, rows] = (d_grouped @ k[:, :, keys]).view(q[:, :, rows].shape)
        if grad_key is not None:
            grad_key[batches, heads] = dk
        if grad_value is not None:
            grad_value[batches, heads] = dv
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, inputs, strict=True)
    ]


def _slopes(alibi_slopes: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    return None if alibi_slopes is None else alibi_slopes.reshape(-1, heads, 1, 1).to(dtype)


def _attend_as_laid_out(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The whole problem as one block. ATen's kernel makes B,L,H,D; where B,H,L,D is wanted, heads become batches."""
    heads = query.shape[1]
    tensors = (query, key, value)
    if key.shape[1] != heads or _is_transposed(query) or not all(map(_heads_are_batches, tensors)):
        out, lse = _attend(query, key, value, None, scale, 0, causal)
        return _laid_out(out, query), lse
    folded = [tensor.view(-1, 1, *tensor.shape[2:]) for tensor in tensors]
    out, lse = _attend(folded[0], folded[1], folded[2], None, scale, 0, causal)
    out = out.to(query.dtype)  # scores that overflow make it float64
    return out.view(-1, heads, *out.shape[2:]), lse.view(-1, heads, lse.shape[2])


def _heads_are_batches(tensor: Tensor) -> bool:
    """Whether the first two dimensions are one, in memory."""
    batch, heads, _, _ = tensor.shape
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def _is_copied(tensor: Tensor, dtype: torch.dtype, width: int) -> bool:
    return tensor.dtype != dtype or tensor.shape[-1] != width or tensor.stride(-1) != 1


def _operands(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in `dtype`, rows contiguous and padded with zeros (ATen's kernel assumes all that)."""
    return _operand(query, dtype, width), _operand(key, dtype, width), _operand(value, dtype, value_width)


def _operand(tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    if tensor.shape[-1] == width:
        operand = tensor.to(dtype)
        return operand if operand.stride(-1) == 1 else operand.contiguous()
    operand = torch.zeros((*tensor.shape[:-1], width), dtype=dtype)
    operand[..., : tensor.shape[-1]] = tensor
    return operand


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """[B,Hq,rows,X] as [B,Hkv,Hq/Hkv*rows,X]: the heads of a group then share a key without a copy of it."""
    return tensor.reshape(tensor.shape[0], key_heads, -1, tensor.shape[-1])


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """softcap(scale * Q K') [B,Hq,rows,keys]."""
    scores = _grouped(query * scale, key.shape[1]) @ key.transpose(-1, -2)
    if softcap > 0:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.view(*query.shape[:3], key.shape[2])


def _softmax_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    factors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, scale, softcap)
    if mask is not None:
        scores += mask
    maximum = scores.amax(-1, keepdim=True)
    maximum.masked_fill_(maximum == HIDDEN, 0)
    total = scores.sub_(maximum).exp_().sum(-1, keepdim=True)
    if factors is not None:
        scores *= factors
    out = (_grouped(scores, key.shape[1]) @ value).view(*query.shape[:3], value.shape[3])
    return out.div_(total.masked_fill(total == 0, 1)), maximum.add_(total.log_()).squeeze(-1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, and the share [B,Hq,rows,1] of the row's sink; all are 0 in a row that sees nothing."""
    maximum = scores.amax(-1, keepdim=True)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks)
    maximum = maximum.masked_fill(maximum == HIDDEN, 0)
    probability = (scores - maximum).exp_()
    total = probability.sum(-1, keepdim=True)
    extra = torch.zeros_like(total) if sinks is None else torch.exp(sinks - maximum)
    total = (total + extra).masked_fill_(total + extra == 0, 1)
    return probability.div_(total), extra.div_(total)


def _fused_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:  # ATen reports 0 for a row that sees nothing
        lse = lse.masked_fill(mask.amax(-1) == HIDDEN, HIDDEN)
    return out, lse


def _overflows(query: Tensor, key: Tensor) -> bool:
    """Whether q.k may leave float32 although q and k are finite."""
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
    if query.dtype == torch.float32 and not math.isfinite(lse.sum()) and _overflows(query, key):
        mask, factors = (None if tensor is None else tensor.double() for tensor in (mask, factors))
        return _attend(query.double(), key.double(), value.double(), mask, scale, softcap, causal, factors)
    return out, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with one more logit, `sinks` [heads,1], in the softmax's denominator."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype))
    share = torch.exp(lse - total).masked_fill_(lse == HIDDEN, 0)
    return out * share[..., None], total
