"""Attention over sequences packed one behind the other, without padding."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import _simulation
from ._arguments import Varlen
from ._checks.numbers import as_integer, as_number, as_window, check_flag
from ._checks.tensors import check_is_tensor, scale_of, widened
from ._checks.varlen import check_forward, check_starts
from ._cpu import dropout
from ._ops import ops, sharding
from ._ops.autocast import autocast

_Bound = int | None


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mfa.attention` of N sequences at once, whose tokens lie one behind the other (flash-attention's varlen layout).

    Sequence n has the query tokens cu_seqlens_q[n] ... cu_seqlens_q[n+1]-1, and the key tokens that cu_seqlens_k says;
    below, Lq and Lk are its lengths, and i and j count from its start. Either may be 0. Tokens behind the last sequence
    belong to none: their out is 0, their lse -inf, their gradients 0. Nothing waits for a device, unless
    max_seqlen is a tensor.

    Args:
        query: [Tq,Hq,D]; float16, bfloat16, float32 or, on the CPU, float64. Any strides; D <= 256.
        key: [Tk,Hkv,D], of the same dtype and device; Hq is a multiple of Hkv, query head h uses key head h//(Hq/Hkv).
        value: [Tk,Hkv,Dv], of the same dtype and device; Dv <= 256.
        cu_seqlens_q, cu_seqlens_k: int32 [N+1], on the same device: 0, then where each sequence ends. Beside DTensors,
            plain tensors are those of every process.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Integers, or tensors without dimensions, which are read.
        is_causal: query i sees key j iff j <= i+Lk-Lq: aligned to the lower right, other than in `mfa.attention`.
        scale: of the scores; None is 1/sqrt(D).
        window: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right. None is open; bounds may be
            negative.
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap), before ALiBi.
        alibi_slopes: float32 [Hq] or [N,Hq]: adds -slope*|i+Lk-Lq-j|.
        sinks: [Hq], float32 or the query's dtype: one more logit per head that takes probability and has no value.
        dropout_p: within [0, 1); keyed on (sequence, head, query, key).
        return_lse: also return the log-sum-exp of the scores, in natural logarithms.

    Returns:
        out [Tq,Hq,Dv] in the query's dtype; with return_lse also lse [Hq,Tq], float32. A row that sees no key: out 0,
        lse -inf (with sinks: lse is the sink). Gradients flow to query, key, value, sinks and alibi_slopes.

    Raises:
        ValueError: shapes, lengths or values out of range; tensors on different devices; where the host can see them,
            cu_seqlens that don't start with 0, decrease, end behind the tokens or exceed max_seqlen. On a GPU such
            contents are clamped.
        TypeError: dtypes that differ or aren't supported.
        NotImplementedError: a legal request that isn't supported: a device or a head dimension.
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
    arguments = Varlen(
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=sharding.beside(query, cu_seqlens_q),
        cu_seqlens_k=sharding.beside(query, cu_seqlens_k),
        max_seqlen_q=as_integer("max_seqlen_q", max_seqlen_q),
        max_seqlen_k=as_integer("max_seqlen_k", max_seqlen_k),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        scale=scale_of(query, scale),
        window_left=left,
        window_right=right,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    device = query.device.type
    if device in ("cpu", "mps") and torch.is_autocast_enabled(device):
        arguments = autocast(device, arguments)
    if sinks is not None:
        arguments = arguments._replace(sinks=widened(arguments.sinks, arguments.query))
    check_forward(arguments, metal=_simulation.runs_kernels(query))
    check_starts(arguments)
    if dropout_p > 0:
        arguments = arguments._replace(rng_state=dropout.new_state(query.device))
    out, lse = ops.attention_varlen_forward(*arguments)
    return (out, lse) if return_lse else out
