"""Attention over sequences packed one behind the other, without padding."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _simulation
from ._arguments import Paged, Varlen
from ._checks.cache import check_no_grad
from ._checks.numbers import as_integer, as_number, as_window, check_flag
from ._checks.paged import check_paged, check_paged_contents
from ._checks.tensors import check_is_tensor, scale_of, widened
from ._checks.varlen import check_forward, check_starts
from ._cpu import dropout
from ._ops import inference, ops, sharding
from ._ops.autocast import autocast

_Bound = int | None


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mfa.attention` of N sequences at once, whose tokens lie one behind the other (flash-attention's varlen layout).

    Sequence n has the query tokens cu_seqlens_q[n] ... cu_seqlens_q[n+1]-1, and the key tokens that cu_seqlens_k says;
    below, Lq and Lk are its lengths, and i and j count from its start. Either may be 0. Tokens behind the last sequence
    belong to none: their out is 0, their lse -inf, their gradients 0. Nothing waits for a device, unless
    max_seqlen is a tensor.

    With block_table, keys and values lie in pages, as in `mfa.attention_with_kv_cache`: token t of sequence n is in
    slot t % page of page block_table[n, t // page]. What no live token needs is never read, neither slots nor entries
    of the table. Long and short sequences of queries may be mixed, as continuous batching mixes prefill and decoding.
    There are no gradients then, and no dropout.

    Args:
        query: [Tq,Hq,D]; float16, bfloat16, float32 or, on the CPU, float64. Any strides. D <= 512, or
            576 with Dv 512 (MLA).
        key: [Tk,Hkv,D], of the same dtype and device; Hq is a multiple of Hkv, query head h uses key head h//(Hq/Hkv).
            With block_table: pages [pages,Hkv,page,D], page a multiple of 8; of the query's dtype, int8 or
            float8_e4m3fn. Any strides.
        value: [Tk,Hkv,Dv], of the same dtype and device; Dv <= 512. With block_table: as key.
        cu_seqlens_q, cu_seqlens_k: int32 [N+1], on the same device: 0, then where each sequence ends. Beside DTensors,
            plain tensors are those of every process. With block_table, cu_seqlens_k is None.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Integers, or tensors without dimensions, which are read.
        is_causal: query i sees key j iff j <= i+Lk-Lq: aligned to the lower right, other than in `mfa.attention`.
        scale: of the scores; None is 1/sqrt(D).
        window: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right. None is open; bounds may be
            negative.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap), before ALiBi.
        alibi_slopes: float32 [Hq] or [N,Hq]: adds -slope*|i+Lk-Lq-j|.
        sinks: [Hq], float32 or the query's dtype: one more logit per head that takes probability and has no value.
        dropout_p: within [0, 1); keyed on (sequence, head, query, key).
        block_table: int32 [N,pages per sequence].
        seqused_k: int32 [N]: the keys of each sequence that count, its first ones; Lk is this number. With block_table:
            its live tokens. None: all that cu_seqlens_k says.
        key_scale, value_scale: float32, the shape of pages of 8-bit numbers without D (`mfa.quantize_kv`); else None.
        return_lse: also return the log-sum-exp of the scores, in natural logarithms.

    Returns:
        out [Tq,Hq,Dv] in the query's dtype; with return_lse also lse [Hq,Tq], float32. A row that sees no key: out 0,
        lse -inf (with sinks: lse is the sink). Gradients flow to query, key, value, sinks and alibi_slopes.

    Raises:
        ValueError: shapes, lengths or values out of range; tensors on different devices; where the host can see them,
            cu_seqlens that don't start with 0, decrease, end behind the tokens or exceed max_seqlen, seqused_k that
            exceed these or the pages, pages that don't exist. On a GPU such contents are clamped.
        TypeError: dtypes that differ or aren't supported.
        NotImplementedError: a legal request that isn't supported: a device, a head dimension, or gradients or dropout
            with block_table.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
    sharding.ready(query)
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        check_flag(name, flag)
    dropout_p, softcap = as_number("dropout_p", dropout_p), as_number("softcap", softcap)
    scale = None if scale is None else as_number("scale", scale)
    left, right = as_window(window)
    if is_causal:
        right = 0 if right is None else torch.sym_min(right, 0)
    terms: dict[str, Any] = {
        "max_seqlen_q": as_integer("max_seqlen_q", max_seqlen_q),
        "max_seqlen_k": as_integer("max_seqlen_k", max_seqlen_k),
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "scale": scale_of(query, scale),
        "window_left": left,
        "window_right": right,
        "softcap": softcap,
    }
    starts_q = sharding.beside(query, cu_seqlens_q)
    used = None if seqused_k is None else sharding.beside(query, seqused_k)
    if block_table is not None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given, and block_table too; it must be None: seqused_k has the lengths")
        if used is None:
            raise ValueError("seqused_k is None; it must be given with block_table")
        terms |= {"seqused_k": used, "block_table": sharding.beside(query, block_table)}
        terms |= {"key_scale": key_scale, "value_scale": value_scale}
        out, lse = _over_pages(Paged(query, key, value, starts_q, **terms), dropout_p)
    else:
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k is None; it must be given unless block_table is")
        for name, scale_tensor in (("key_scale", key_scale), ("value_scale", value_scale)):
            if scale_tensor is not None:
                raise ValueError(f"{name} is given without block_table; it must be None: only pages may have 8 bits")
        starts_k = sharding.beside(query, cu_seqlens_k)
        out, lse = _over_packed(
            Varlen(query, key, value, starts_q, starts_k, **terms, dropout_p=dropout_p, seqused_k=used)
        )
    return (out, lse) if return_lse else out


def _over_packed(arguments: Varlen) -> tuple[Tensor, Tensor]:
    device = arguments.query.device.type
    if device in ("cpu", "mps") and torch.is_autocast_enabled(device):
        arguments = autocast(device, arguments)
    arguments = arguments._replace(sinks=widened(arguments.sinks, arguments.query))
    check_forward(arguments, metal=_simulation.runs_kernels(arguments.query))
    check_starts(arguments)
    if arguments.dropout_p > 0:
        arguments = arguments._replace(rng_state=dropout.new_state(arguments.query.device))
    outputs: tuple[Tensor, Tensor] = ops.attention_varlen_forward(*arguments)
    return outputs


def _over_pages(arguments: Paged, dropout_p: float) -> tuple[Tensor, Tensor]:
    query = arguments.query
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p is {dropout_p}, and block_table is given; attention over pages has none")
    device = query.device.type
    if device in ("cpu", "mps") and torch.is_autocast_enabled(device):
        query = inference.autocast(device, query, arguments.key, arguments.value)
    arguments = arguments._replace(query=query, sinks=widened(arguments.sinks, query))
    check_paged(arguments, metal=_simulation.runs_kernels(query))
    check_paged_contents(arguments)
    if torch.is_grad_enabled():
        check_no_grad(arguments)
    outputs: tuple[Tensor, Tensor] = ops.attention_varlen_paged(*arguments)
    return outputs
