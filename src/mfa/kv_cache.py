"""Attention of new queries over a cache of keys and values, dense or paged, of full or of 8-bit numbers."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _simulation
from ._arguments import Append, Decode
from ._checks.append import check_positions, check_rotary
from ._checks.cache import check_batch_idx, check_decode, check_lengths, check_new_tokens, check_no_grad
from ._checks.numbers import as_integer, as_number, as_window, check_flag
from ._checks.sizes import is_known
from ._checks.tensors import check_is_tensor, scale_of, widened
from ._ops import ops, sharding
from ._ops.inference import autocast

_Bound = int | None


@overload
def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    num_splits: int = 0,
    attn_mask: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    num_splits: int = 0,
    attn_mask: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    num_splits: int = 0,
    attn_mask: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    rotary_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, in place, and attends over its live part. Nothing waits for a device.

    Batch entry b has Lk = cache_seqlens[b] + Lnew live tokens (Lnew is 0 without `key`), less cache_leftpad[b]. What
    lies before or behind them is never read, and may be anything; nor is an entry of the block table that no live token
    needs.

    A paged cache is one pool of pages for all batch entries: token t of entry b is in slot t % page of page
    block_table[b, t // page]. Entries may share pages, but not the slots that they append to (vLLM; as in
    flash-attention). A quantized cache holds 8-bit numbers, of which each token of each head has a scale; new tokens
    are quantized as `mfa.quantize_kv` does it. Keys and values may be held in different ways.

    Args:
        query: [B,Hq,Lq,D]; float16, bfloat16, float32 or, on the CPU, float64. Any strides. D <= 512, or
            576 with Dv 512 (MLA).
        key_cache: dense [B,Hkv,Lmax,D] or paged [pages,Hkv,page,D], page a multiple of 8; of the query's dtype, int8,
            float8_e4m3fn or float8_e5m2. Any strides. Modified if `key` is given.
        value_cache: as key_cache, with Dv <= 512 for D, and a dtype of its own. Modified if `value` is given.
        key, value: [B,Hkv,Lnew,D] and [B,Hkv,Lnew,Dv], of the query's dtype, appended at cache_seqlens; both or none.
        cache_seqlens: int32 [B], or one integer for all: tokens in the cache before the call. Not modified.
        block_table: int32 [B,pages per sequence], of a paged cache.
        is_causal: query i sees key j iff j <= i+Lk-Lq: aligned to the lower right.
        scale: of the scores; None is 1/sqrt(D).
        window: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right. None is open; bounds may be
            negative.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap), before ALiBi.
        alibi_slopes: float32 [Hq] or [B,Hq]: adds -slope*|i+Lk-Lq-j|.
        sinks: [Hq], float32 or the query's dtype: one more logit per head that takes probability and has no value.
        key_scale, value_scale: float32, the shape of a quantized cache without D; modified with it. None for others.
        num_splits: into how many parts the kernels cut the keys, so that few rows fill a GPU: 0 lets them choose. The
            result differs in rounding only. The CPU implementation needs no parts.
        attn_mask: bool [B|1,Hq|1,Lq,K], True = attend, over the last K live tokens, K <= Lk: which drafted tokens of a
            tree see which. Tokens before them are seen as is_causal and window say, which count among the last K too.
        rotary_cos, rotary_sin: [positions,R/2], R <= D, float32 or the query's dtype: query and key are rotated before
            they are used, in the launch that appends. Both or none, with key and value only. As in flash-attention,
            key i is at position cache_seqlens+i, whatever cache_leftpad is, and so is query i; but without is_causal
            and window all queries are at cache_seqlens.
        rotary_interleaved: pairs are dimensions 2i and 2i+1 (GPT-J), else i and i+R/2 (GPT-NeoX).
        rotary_seqlens: int32 [B]: the first position, where it isn't cache_seqlens.
        cache_batch_idx: int32 [B], the rows of a dense cache, which may then have any number of them.
        cache_leftpad: int32 [B], where the live tokens of each row start: at most cache_seqlens.
        return_lse: also return the log-sum-exp of the scores, in natural logarithms.

    Returns:
        out [B,Hq,Lq,Dv] in the query's dtype, B,L,H,D in memory if the query is; with return_lse also lse [B,Hq,Lq],
        float32. A row that sees no key: out 0, lse -inf (with sinks: lse is the sink).

    Raises:
        ValueError: shapes, lengths or values out of range; tensors on different devices; where the host can see them,
            lengths beyond the capacity, pages that don't exist, two entries that append to one slot. On a GPU such
            contents are clamped.
        TypeError: dtypes that differ or aren't supported.
        NotImplementedError: a legal request that isn't supported: gradients, a device, or a head dimension.
    """
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_is_tensor(name, tensor)
    sharding.ready(query)
    for name, flag in (
        ("is_causal", is_causal),
        ("rotary_interleaved", rotary_interleaved),
        ("return_lse", return_lse),
    ):
        check_flag(name, flag)
    softcap, scale = as_number("softcap", softcap), None if scale is None else as_number("scale", scale)
    left, right = as_window(window)
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = as_integer("cache_seqlens", cache_seqlens)
    if (key is None) != (value is None):
        given, missing = ("value", "key") if key is None else ("key", "value")
        raise ValueError(f"{missing} is None, and {given} is given; both or none must be")
    device = query.device.type
    if device in ("cpu", "mps") and torch.is_autocast_enabled(device):
        caches = key_cache, value_cache
        query = autocast(device, query, *caches)
        key, value = (t if t is None else autocast(device, t, *caches) for t in (key, value))
    table = block_table
    if cache_batch_idx is not None:
        check_batch_idx(cache_batch_idx, block_table, query)
        table = cache_batch_idx.unsqueeze(1)  # a row is the only page of its entry
    if is_causal:
        right = 0 if right is None else torch.sym_min(right, 0)
    lengths: Any = cache_seqlens  # a number becomes a tensor once all has been checked
    arguments = Decode(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        cache_lengths=lengths,
        block_table=table,
        key_scale=key_scale,
        value_scale=value_scale,
        attn_mask=attn_mask,
        cache_leftpad=cache_leftpad,
        sinks=widened(sinks, query),
        alibi_slopes=alibi_slopes,
        scale=scale_of(query, scale),
        window_left=left,
        window_right=right,
        softcap=softcap,
        num_splits=as_integer("num_splits", num_splits),
    )
    check_decode(arguments, metal=_simulation.runs_kernels(query))
    new = 0
    if key is not None and value is not None:
        check_new_tokens(arguments, key, value)
        new = key.shape[2]
    elif rotary_cos is not None or rotary_sin is not None:
        given = "rotary_sin" if rotary_cos is None else "rotary_cos"
        raise ValueError(f"key is None, and {given} is given; key and value must be given with it")
    advance = (left, right) != (None, None)
    check_rotary(query, rotary_cos, rotary_sin, rotary_seqlens)
    check_lengths("cache_seqlens", cache_seqlens, new, arguments, of_rows=cache_batch_idx is not None)
    if rotary_cos is not None:
        starts = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        check_positions(query, new, rotary_cos, starts, advance=advance)
    if torch.is_grad_enabled():
        check_no_grad(arguments)

    if key is not None and value is not None and not (rotary_cos is None and is_known(new == 0)):
        append = Append(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            key=key,
            value=value,
            cache_lengths=lengths if isinstance(lengths, Tensor) else None,
            cache_length=0 if isinstance(lengths, Tensor) else lengths,
            block_table=table,
            key_scale=key_scale,
            value_scale=value_scale,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_seqlens=rotary_seqlens,
            rotary_interleaved=rotary_interleaved,
            queries_advance=advance,
        )
        rotated, lengths = ops.attention_append(*append)
        if rotary_cos is not None:
            query = rotated
    elif not isinstance(lengths, Tensor):
        lengths = torch.full((query.shape[0],), lengths, dtype=torch.int32, device=query.device)
    arguments = arguments._replace(query=query, cache_lengths=lengths)
    out, lse = ops.attention_decode(*arguments)
    return (out, lse) if return_lse else out
