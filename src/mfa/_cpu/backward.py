"""Gradients of attention on ATen for CPU tensors: blockwise, O(L) memory, every feature, float16 to float64.

    for each chunk of heads:                      only as many as fit the scratch budget
        for each block of query rows:             rows that see no key are never visited
            dQ, dK, dV <- those of softmax(scale * Q K' + mask) V, of the keys that some row sees

A block is ATen's own fused kernel, or, for what that lacks, matrix operations. Half types are computed in float32.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._arguments import DENSE_GRADIENTS, Backward, Dense, Varlen
from .blocks import HIDDEN, Band, Block, Cut, Terms, Window, part
from .dropout import COPIES, Dropout
from .forward import exactly_scaled, is_copied, operand, overflows, raw_scores, slopes_of
from .layout import heads_are_batches
from .listed import ListedMask

# Scores of a group of heads, at most, that are computed at once: about where the calls cost as much as the arithmetic.
SHORT = 1 << 17

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def wanted_inputs(
    arguments: Dense | Varlen, gradients: tuple[str, ...], output_mask: Sequence[bool]
) -> dict[str, Tensor]:
    """The tensors whose gradients are wanted, by name; `gradients` names what the mask is about."""
    found = {name: getattr(arguments, name) for name, asked in zip(gradients, output_mask, strict=True) if asked}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def attention_backward(arguments: Dense, given: Backward, *, first_batch: int = 0) -> dict[str, Tensor]:
    """`mfa::attention_backward` for CPU tensors. The caller has checked the arguments.

    Args:
        first_batch: what dropout counts batches from.

    Returns:
        The gradients that are wanted, of tensors that were given, by the names in DENSE_GRADIENTS; each in its tensor's
        shape and dtype, contiguous.
    """
    query, key, value, grad_out = arguments.query, arguments.key, arguments.value, given.grad_out
    dtype = torch.promote_types(query.dtype, torch.float32)
    window = Window.of(query.shape[2], key.shape[2], arguments.window_left, arguments.window_right)
    terms = Terms(window, arguments.bias, slopes_of(arguments.alibi_slopes, query.shape[1], dtype), dtype)
    dropout = Dropout.of(arguments, first_batch)
    inputs = wanted_inputs(arguments, DENSE_GRADIENTS, given.output_mask)
    # ATen's kernel starts from out and lse, which must be exact to float32, and has the gradients of three inputs.
    exact = query.dtype == torch.float32 or (dtype == torch.float32 and given.correction is not None)
    masked_only = arguments.softcap == 0 and dropout is None and given.grad_lse is None
    masked_only = masked_only and not ("bias" in inputs or "alibi_slopes" in inputs)
    # Its delta comes from out: a sum over Dv, of which a bfloat16 out and its correction have 20 bits. This is felt
    # where no row sees more than one key, so that gradients of query and key are 0; where Dv is much larger than D,
    # whose scale doesn't make up for it; and by sinks, whose gradient is float32.
    few_keys, few_dims = window.block_keys(1) <= 1, 4 * query.shape[3] < value.shape[3]
    feels_delta = few_keys or few_dims or ("sinks" in inputs and query.dtype == torch.bfloat16)
    feels_delta = feels_delta or arguments.block_mask is not None  # which may leave a row one key
    fused = exact and masked_only and not feels_delta and grad_out.numel() > 0 and not overflows(query, key)
    if fused and "sinks" not in inputs:
        found = _fused_at_once(arguments, given, terms)
        if found is not None:
            return {name: found[name] for name in inputs}

    # Sums are kept in the dtype of the scores until the end; those of key and value only for a chunk.
    grads = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype if name in ("query", "key", "value") else dtype)
        for name, tensor in inputs.items()
    }
    if grad_out.numel() == 0:
        pass
    elif fused:
        _add_fused(grads, arguments, given, terms)
    else:
        _add_composed(grads, arguments, given, terms, dropout)
    return {name: grad.to(inputs[name].dtype) for name, grad in grads.items()}


def _fused_as_laid_out(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """ATen's kernel makes B,L,H,D; where B,H,L,D is wanted, heads become batches."""
    query, factor, power = exactly_scaled(query, scale)
    tensors = (grad_out, query, key, value, out)
    if mask is not None or key.shape[1] != query.shape[1] or not all(map(heads_are_batches, tensors)):
        found = list(_fused(*tensors, lse, 0.0, causal, attn_mask=mask, scale=power))
    else:
        folded = [tensor.view(-1, 1, *tensor.shape[2:]) for tensor in tensors]
        grads = _fused(*folded, lse.reshape(-1, 1, lse.shape[2]), 0.0, causal, scale=power)
        found = [grad.view(tensor.shape) for grad, tensor in zip(grads, tensors[1:4], strict=True)]
    if factor != 1:
        found[0].mul_(factor)
    return found


def _fused_at_once(arguments: Dense, given: Backward, terms: Terms) -> dict[str, Tensor] | None:
    """Gradients of query, key and value from one call that copies at most grad_out; None if that can't be."""
    query, key, value, scale = arguments.query, arguments.key, arguments.value, arguments.scale
    visible = terms.window.rows()
    everything = (visible, terms.window.keys(visible)) == (slice(0, query.shape[2]), slice(0, key.shape[2]))
    whole, causal = terms.as_one_block(scale)

    def fits(tensor: Tensor) -> bool:
        alike = tensor.shape[:2] == query.shape[:2] and not is_copied(tensor, terms.dtype, query.shape[3])
        return alike and heads_are_batches(tensor)

    if not (everything and whole and all(map(fits, (query, key, value, given.out)))):
        return None
    d_out = operand(given.grad_out, terms.dtype, value.shape[3])
    if not fits(d_out):
        return None
    grads = _fused_as_laid_out(d_out, query, key, value, given.out, given.lse, None, scale, causal)
    return dict(zip(("query", "key", "value"), grads, strict=True))


def _add_fused(grads: dict[str, Tensor], arguments: Dense, given: Backward, terms: Terms) -> None:
    """Fills in the gradients of query, key, value and sinks, by ATen's kernel, which has one width for D and Dv."""
    query, key, value, sinks, scale = arguments.query, arguments.key, arguments.value, arguments.sinks, arguments.scale
    dtype, window, dim, value_dim = terms.dtype, terms.window, query.shape[3], value.shape[3]
    width, group = max(dim, value_dim), query.shape[1] // key.shape[1]
    whole, causal = terms.as_one_block(scale)
    visible = window.rows()
    at_once = whole and window.keys(visible) == slice(0, key.shape[2])
    block_rows = query.shape[2] if whole else window.block_rows()
    operand_bytes = 4 * width * (group * block_rows + key.shape[2]) * dtype.itemsize
    least = torch.get_num_threads()  # heads; each is one thread's
    cut = Cut.of(terms, len(query), key.shape[1], group, operand_bytes, 0, least)
    alike = 1
    if not whole and terms.bias is None:
        cut, alike = cut.banded(4 * width * (group * block_rows + window.block_keys(block_rows)) * dtype.itemsize)
    for batches, heads, q_heads in cut.chunks():
        k, v = (operand(tensor[batches, heads], dtype, width) for tensor in (key, value))
        given_rows = [tensor[batches, q_heads] for tensor in (given.grad_out, query, given.out)]
        if not at_once:
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for band in [Band(visible, window.keys(visible))] if whole else cut.bands(alike):
            d_out, q, o = (operand(band.of_rows(tensor), dtype, width) for tensor in given_rows)
            block_lse = band.of_rows(given.lse[batches, q_heads])
            if given.correction is not None:  # then the operand is a copy
                o[..., :value_dim] += band.of_rows(given.correction[batches, q_heads])
            if "sinks" in grads and sinks is not None:
                share = torch.exp(sinks[q_heads, None] - block_lse).masked_fill_(block_lse == HIDDEN, 0)
                grads["sinks"][q_heads] -= (share * (d_out * o).sum(-1)).sum((0, 2))
            block_lse = block_lse.masked_fill(block_lse == HIDDEN, torch.finfo(dtype).max)  # such a row's P is 0
            mask = None if whole else terms.mask(batches, q_heads, band.rows, band.keys)
            block = d_out, q, band.of_keys(k), band.of_keys(v), o, block_lse
            d_q, d_k, d_v = _fused_as_laid_out(*block, mask, scale, causal)
            if at_once:
                dk, dv = d_k, d_v
            else:
                band.add_to_keys(dk, d_k)
                band.add_to_keys(dv, d_v)
            if "query" in grads:
                band.of_rows(grads["query"][batches, q_heads]).copy_(d_q[..., :dim])
        if "key" in grads:
            grads["key"][batches, heads] = dk[..., :dim]
        if "value" in grads:
            grads["value"][batches, heads] = dv[..., :value_dim]


def _add_composed(
    grads: dict[str, Tensor], arguments: Dense, given: Backward, terms: Terms, dropout: Dropout | None
) -> None:
    """Fills in all gradients, by matrix operations: scores are computed again.

        P = softmax(S),  dP = dO V',  delta = rowsum(P * dP) - dLSE,  dS = P * (dP - delta)
        dQ = scale dS K,  dK = scale dS' Q,  dV = P' dO,  dbias = dS,  dsink = -sum P(sink) delta

    A block has whole rows of S, so the results of the forward pass, and their rounding, aren't needed. Dropout
    multiplies dP, and the P of dV, by the factors that the forward pass had. Heads that share a key have products
    of their own: sums over the rows of all of them would be longer, and BLAS sums those of few rows more exactly. They
    come one after the other, or, if they are short, at once with copies of their key.
    """
    query, key, value, sinks = arguments.query, arguments.key, arguments.value, arguments.sinks
    scale, softcap, grad_lse = arguments.scale, arguments.softcap, given.grad_lse
    dtype, query_heads, key_heads = terms.dtype, query.shape[1], key.shape[1]
    group = query_heads // key_heads
    listed = None if arguments.block_mask is None else ListedMask(arguments.block_mask, terms.window)
    copies = group if group * query.shape[2] * key.shape[2] <= SHORT and (listed is None or listed.heads == 1) else 1
    numbers = 2 * copies * (query.shape[3] + value.shape[3]) * (query.shape[2] + key.shape[2])
    score_copies = 4 if dropout is None else 5 + COPIES
    cut = Cut.of(terms, len(query), key_heads, copies, numbers * dtype.itemsize, score_copies)
    if "sinks" in grads and grad_lse is not None:  # the lse of a row that sees no key is the sink
        grads["sinks"] += grad_lse.sum((0, 2))
    if listed is not None:
        cut = listed.cut(cut)
    for batches, heads, _ in cut.chunks():
        k, v = (operand[batches, heads].to(dtype).repeat_interleave(copies, 1) for operand in (key, value))
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for member in range(group // copies):
            q_heads = slice(heads.start * group + member, heads.stop * group, group // copies)
            q, d_out = query[batches, q_heads].to(dtype), given.grad_out[batches, q_heads].to(dtype)
            blocks: Iterable[Block] = cut.bands(1) if listed is None else listed.blocks(batches, q_heads)
            for block in blocks:
                block_q, block_k, block_v = block.of_rows(q), block.of_keys(k), block.of_keys(v)
                block_d_out = block.of_rows(d_out)
                raw = raw_scores(block_q, block_k, scale, softcap)
                mask = terms.of_block(batches, q_heads, block)
                scores = raw if mask is None else raw + mask
                probability, share = _softmax(scores, None if sinks is None else sinks[q_heads, None, None].to(dtype))
                factors = None if dropout is None else dropout.of_block(batches, q_heads, block.rows, block.spans)
                kept = probability if factors is None else probability * factors
                block.add_to_keys(dv, kept.transpose(-1, -2) @ block_d_out)
                d_scores = block_d_out @ block_v.transpose(-1, -2)
                if factors is not None:
                    d_scores *= factors
                delta = (probability * d_scores).sum(-1, keepdim=True)
                d_scores -= delta  # before anything else, so that it is 0 where a row sees one key
                if grad_lse is not None:
                    d_lse = block.of_rows(grad_lse[batches, q_heads]).unsqueeze(-1)
                    d_scores += d_lse
                    delta -= d_lse
                    if "sinks" in grads:
                        grads["sinks"][q_heads] -= d_lse.sum((0, 2, 3))
                d_scores *= probability
                if "sinks" in grads:
                    grads["sinks"][q_heads] -= (share * delta).sum((0, 2, 3))
                if "bias" in grads:
                    target = part(grads["bias"], batches, q_heads, block.rows, *block.spans)
                    target += d_scores.sum_to_size(target.shape)
                if "alibi_slopes" in grads:
                    slopes = grads["alibi_slopes"].view(-1, query_heads)
                    target = part(slopes, batches)[:, q_heads]
                    distances = torch.cat([terms.distances(block.rows, span) for span in block.spans], 1).abs_()
                    target -= (d_scores * distances).sum((-1, -2)).sum_to_size(target.shape)
                if softcap > 0:
                    d_scores *= 1 - (raw / softcap).square_()
                d_scores *= scale
                block.add_to_keys(dk, d_scores.transpose(-1, -2) @ block_q)
                if "query" in grads:
                    block.of_rows(grads["query"][batches, q_heads]).copy_(d_scores @ block_k)
        if "key" in grads:
            grads["key"][batches, heads] = dk.unflatten(1, (-1, copies)).sum(2)
        if "value" in grads:
            grads["value"][batches, heads] = dv.unflatten(1, (-1, copies)).sum(2)


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
