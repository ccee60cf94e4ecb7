"""What attention refuses, and how its arguments broadcast, with the sentences of tensors.py."""

from typing import Any

import torch
from torch import Tensor

from .. import _simulation
from .tensors import (
    METAL_DTYPES,
    check_is_tensor,
    check_per_head,
    check_rng_state,
    check_shapes,
    check_tensors,
    check_values,
    dtype_name,
    listed,
    shape_of,
)


def check_forward(query: Tensor, key: Tensor, value: Tensor, *terms: Any, metal: bool) -> None:
    """Everything about the arguments of `mfa::attention_forward`, except that dropout has a state (`check_has_state`).

    `terms`: as in `check_terms`. `metal`: the Metal kernels are going to run.
    """
    check_tensors(query, key, value, ranks=(4,))
    check_terms(query, key, value, *terms, metal=metal)


def check_terms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    rng_state: Tensor | None,
    *,
    metal: bool,
    bias_name: str = "bias",
) -> None:
    """The part of `check_forward` that is left after `check_tensors`."""
    check_shapes(query, key, value)
    if bias is not None:
        check_bias(bias_name, bias, query, key)
        if bias.dim() != 4:
            raise ValueError(f"{bias_name} has {bias.dim()} dimensions; it must have 4")
    if sinks is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        check_per_head("sinks", sinks, query, (torch.float32, wide))
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, query, (torch.float32,), per_batch=True)
    check_values(scale, softcap, dropout_p)
    if rng_state is not None:
        check_rng_state(rng_state, dropout_p, query)
    if metal and query.dtype not in METAL_DTYPES:
        names = listed(tuple(map(dtype_name, METAL_DTYPES)))
        raise TypeError(f"query has dtype {dtype_name(query.dtype)}; it must be {names}")


def check_bias(name: str, bias: Tensor, query: Tensor, key: Tensor) -> None:
    """A mask, or additive bias, that broadcasts to [B,Hq,Lq,Lk]."""
    check_is_tensor(name, bias)
    if bias.device != query.device:
        raise ValueError(f"{name} is on {bias.device}; it must be on the device of query, {query.device}")
    if bias.dtype not in (torch.bool, torch.float32, query.dtype):
        names = tuple(dict.fromkeys(["bool", "float32", dtype_name(query.dtype)]))
        raise TypeError(f"{name} has dtype {dtype_name(bias.dtype)}; it must be {listed(names)}")
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(bias.shape), reversed(full), strict=False)
    if bias.dim() > 4 or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"{name} has shape {shape_of(bias)}; it must broadcast to [B,Hq,Lq,Lk] = {list(full)}")


def checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Query, key, value, bias and sinks as the op takes them, or one of the errors that `attention` documents."""
    check_tensors(query, key, value, ranks=(3, 4))
    query, key, value = _broadcast(query, key, value, enable_gqa)
    bias = attn_mask
    if bias is not None:
        check_bias("attn_mask", bias, query, key)
        bias = bias[(None,) * (4 - bias.dim())]
    if sinks is not None:
        check_per_head("sinks", sinks, query, (torch.float32, query.dtype))
        sinks = sinks.to(torch.promote_types(query.dtype, torch.float32)) if sinks.dtype == query.dtype else sinks
    check_terms(
        *(query, key, value, bias, sinks, alibi_slopes),
        *(1.0 if scale is None else scale, softcap, dropout_p, None),
        metal=_simulation.runs_kernels(query),
        bias_name="attn_mask",
    )
    return query, key, value, bias, sinks


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views with 4 dimensions and one batch size; with heads that the op takes, or else left for it to refuse."""
    tensors = [tensor if tensor.dim() == 4 else tensor.unsqueeze(0) for tensor in (query, key, value)]
    batch = _common([tensor.shape[0] for tensor in tensors], "batch size {}; it must be 1 or that of {}, {}")
    query, key, value = (tensor if tensor.shape[0] == batch else tensor.expand(batch, -1, -1, -1) for tensor in tensors)
    if not enable_gqa:
        what = "{} heads; it must have 1, or those of {}, {}, unless enable_gqa is True"
        heads = _common([tensor.shape[1] for tensor in (query, key, value)], what)
        if query.shape[1] != heads:
            query = query.expand(-1, heads, -1, -1)
    if key.shape[1] != value.shape[1]:  # one of them has a single head
        key_heads = _common([1, key.shape[1], value.shape[1]], "{} heads; it must have 1, or those of {}, {}")
        key, value = (
            tensor if tensor.shape[1] == key_heads else tensor.expand(-1, key_heads, -1, -1) for tensor in (key, value)
        )
    return query, key, value


def _common(sizes: list[int], what: str) -> int:
    """The size that the sizes of query, key and value broadcast to."""
    names = ("query", "key", "value")
    common, owner = 1, "query"
    for name, size in zip(names, sizes, strict=True):
        if common == 1:
            common, owner = size, name
        elif size not in (1, common):
            raise ValueError(f"{name} has " + what.format(size, owner, common))
    return common
