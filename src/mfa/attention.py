"""What users call: arguments are checked and made canonical here, then the op runs."""

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ._arguments import Dense
from ._checks.dense import checked, have_plain_shapes, is_plain
from ._checks.numbers import as_number, as_window, check_flag
from ._checks.tensors import (
    as_runtime_errors,
    check_is_tensor,
    scale_of,
)
from ._cpu import dropout
from ._cpu.forward import attention_forward
from ._ops import LIBRARY, ops, sharding
from ._ops.autocast import autocast
from ._ops.dense import nothing_listens
from .block_mask import PackedBlockMask, check_fits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_Bound = int | None
_NUMBERS = (int, float)
_OPEN = (None, None)
_forward = ops.attention_forward.default
# All that a call of it calls: saves a tenth of the op's time on the host. Not where torch.compile traces.
_forward_untraced = getattr(_forward, "_op", _forward)
# Defaults are written 0, not 0.0: torch.compile(dynamic=True) makes a symbol of a float default, then compiles again.


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: "BlockMask | PackedBlockMask | None" = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[_Bound, _Bound] = (None, None),
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: "BlockMask | PackedBlockMask | None" = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[_Bound, _Bound] = _OPEN,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_mask: "BlockMask | PackedBlockMask | None" = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K' + mask) V in memory that grows with the lengths, not with their product.

    The first eight arguments are those of `torch.nn.functional.scaled_dot_product_attention`, with its meaning; leading
    dimensions broadcast as there. Scores, softmax and sums are float32 (float64 for float64).

    Args:
        query: [B,Hq,Lq,D] or [Hq,Lq,D]; float16, bfloat16, float32 or, on the CPU, float64. Any strides. D <= 512, or
            576 with Dv 512 (MLA).
        key: [B,Hkv,Lk,D] or [Hkv,Lk,D], of the same dtype and device.
        value: [B,Hkv,Lk,Dv] or [Hkv,Lk,Dv], of the same dtype and device; Dv <= 512.
        attn_mask: broadcasts to [B,Hq,Lq,Lk] and is never expanded. bool (True = attend), or float32 or the query's
            dtype, added to the scaled scores; -inf, or at most -1e38, masks a key. is_causal may be given as well.
        dropout_p: within [0, 1), rounded to a multiple of 1/65536: the share of probabilities that become 0, while the
            others grow to make up for them; lse doesn't change. torch.manual_seed reproduces which ones: a function of
            two numbers drawn per call, and of batch, head, query and key, the same in forward and backward and on every
            device. Under torch.vmap, its `randomness` says whether mapped elements share it.
        is_causal: query i sees key j iff j <= i (aligned to the upper left).
        scale: of the scores; None is 1/sqrt(D).
        enable_gqa: allows Hq to be a multiple of Hkv; query head h then uses key head h // (Hq/Hkv).
        window: (left, right): query i sees key j iff i+Lk-Lq-left <= j <= i+Lk-Lq+right. None is open; bounds may be
            negative. Flash-attention's causal is (None, 0).
        softcap: > 0 replaces a scaled score s by softcap*tanh(s/softcap), before mask and ALiBi (Gemma 2).
        alibi_slopes: float32 [Hq] or [B,Hq]: adds -slope*|i+Lk-Lq-j| (Press et al. 2022, as in flash-attention).
        sinks: [Hq], float32 or the query's dtype: one more logit per head that takes probability and has no value
            (gpt-oss).
        block_mask: of torch's FlexAttention, or one that `pack_block_mask` made of it: what it hides costs nothing, and
            nothing of the size Lq x Lk is made. Without attn_mask. A BlockMask is packed once, and remembered with it.
        return_lse: also return the log-sum-exp of the scores, in natural logarithms.

    Returns:
        out [B,Hq,Lq,Dv] in the query's dtype, without B if no input has it; B,L,H,D in memory if the query is. With
        return_lse also lse [B,Hq,Lq], float32. A row that sees no key: out 0, lse -inf (with sinks: lse is the sink).

    Raises:
        ValueError: shapes, lengths or values out of range; tensors on different devices.
        TypeError: dtypes that differ or aren't supported.
        NotImplementedError: a legal request that isn't supported: a device, a head dimension.
    """
    plain = (
        not torch.compiler.is_dynamo_compiling()  # sizes may be symbols
        and alibi_slopes is sinks is None
        and block_mask is None
        and (window is _OPEN or (type(window) is tuple and len(window) == 2 and window[0] is window[1] is None))
        and (dropout_p == softcap == 0 and type(dropout_p) in _NUMBERS and type(softcap) in _NUMBERS)
        and (scale is None or (type(scale) is float and scale == scale))
        and type(is_causal) is type(enable_gqa) is type(return_lse) is bool
        and is_plain(query, key, value, attn_mask, enable_gqa)
    )
    if plain:
        arguments: tuple[Any, ...] = _plain_arguments(query, key, value, attn_mask, is_causal, scale)
        has_batch = True
    else:  # which takes longer than the rest of a decoding step
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_is_tensor(name, tensor)
        sharding.ready(query)
        for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa), ("return_lse", return_lse)):
            check_flag(name, flag)
        dropout_p, softcap = as_number("dropout_p", dropout_p), as_number("softcap", softcap)
        scale = None if scale is None else as_number("scale", scale)
        left, right = as_window(window)
        mask = None if block_mask is None else _packed(block_mask)
        given = Dense(
            query=query,
            key=key,
            value=value,
            bias=attn_mask,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            scale=scale_of(query, scale),
            window_left=left,
            window_right=right,
            softcap=softcap,
            dropout_p=dropout_p,
            block_mask=None if mask is None else mask.data,
        )
        device = query.device.type
        if device in ("cpu", "mps") and torch.is_autocast_enabled(device):
            given = autocast(device, given)
        has_batch = max(query.dim(), key.dim(), value.dim()) == 4
        given = checked(given, enable_gqa)
        if mask is not None:
            check_fits(mask.shape, given.query.shape, given.key.shape[2])
        if is_causal:  # aligned to the upper left; windows are relative to the lower right
            diagonal = given.query.shape[2] - given.key.shape[2]
            given = given._replace(window_right=diagonal if right is None else torch.sym_min(right, diagonal))
        if dropout_p > 0:
            given = given._replace(rng_state=dropout.new_state(query.device))
        arguments = given
    if query.is_cpu and nothing_listens(arguments):
        out, lse = attention_forward(Dense._make(arguments), exact_lse=return_lse, trains=False)
    else:
        out, lse = _forward(*arguments)
    if not has_batch:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


# There torch.compile asks functions about constants only.
_PACKS_IN_EAGER_ONLY = str(torch.__version__).startswith(("2.10.", "2.11.", "2.12."))


def _packed(block_mask: Any) -> PackedBlockMask:
    """A PackedBlockMask as it is; a BlockMask packed, once for as long as it lives."""
    if isinstance(block_mask, PackedBlockMask):
        return block_mask
    if _PACKS_IN_EAGER_ONLY and torch.compiler.is_compiling():
        raise NotImplementedError(
            f"block_mask is a BlockMask, of which torch {torch.__version__} can't compile what it holds; "
            "give what mfa.pack_block_mask makes of it"
        )
    from ._remembered import remembered  # brings torch._dynamo, as torch's module of BlockMask does

    return remembered(block_mask)


def _plain_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Any, ...]:
    """Those of the op, of what `is_plain` takes; in a bare tuple, since making a Dense is felt."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    right = query.shape[2] - key.shape[2] if is_causal else None
    return query, key, value, attn_mask, None, None, scale, None, right, 0.0, 0.0, None, None


_attention_or_runtime_error = as_runtime_errors(attention)


def _composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`mfa::attention`. On mps the schema and the kernel have checks of their own, in less time."""
    if (
        attn_mask is None
        and (type(query) is type(key) is type(value) is Tensor and query.is_mps)
        and (dropout_p == 0 and have_plain_shapes(query, key, value))
    ):
        out: Tensor = _forward_untraced(*_plain_arguments(query, key, value, None, is_causal, scale))[0]
        return out
    return _attention_or_runtime_error(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


LIBRARY.impl("attention", _composite, "CompositeImplicitAutograd")
