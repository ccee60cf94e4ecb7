"""What the package refuses, and the sentences it does that with: the argument, what it was, what it must be.

ValueError for shapes and values, TypeError for dtypes, NotImplementedError for legal requests that nothing here can do
yet. Called through `torch.ops`, the same sentences are RuntimeErrors (`as_runtime_errors`).
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .._arguments import Backward, Decode, Dense, Paged, Varlen
from .sizes import equal, holds

LARGEST_HEAD_DIM = 512
LATENT_DIMS = (576, 512)  # D and Dv of MLA, whose values are a part of its keys
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METAL_DTYPES = DTYPES[:3]
# Fake tensors have the device that they stand for; "meta" computes shapes.
DEVICES = ("mps", "cpu", "meta")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def as_runtime_errors(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """What an op's kernel raises: RuntimeError, as from a kernel in C++ (NotImplementedError already is one)."""

    @functools.wraps(function)
    def wrapper(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise RuntimeError(str(error)) from error

    return wrapper


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is of type {type(value).__name__}; it must be a tensor")


def check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout == torch.strided and not tensor.is_nested:
        return
    layout, remedy = str(tensor.layout).removeprefix("torch."), "use to_dense()"
    if tensor.is_nested:
        layout, remedy = "nested", "pad it"
    raise NotImplementedError(f"{name} has layout {layout}; only strided tensors are supported: {remedy}")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, ranks: tuple[int, ...]) -> None:
    """Rank, layout, device and dtype of the three; sizes are left to `check_shapes`."""
    dtype, device = query.dtype, query.device
    if (
        (query.is_cpu or query.is_mps)
        and dtype in DTYPES
        and key.dtype is dtype
        and value.dtype is dtype
        and key.device == device
        and value.device == device
        and query.dim() in ranks
        and key.dim() in ranks
        and value.dim() in ranks
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
    ):
        return  # in a third of the time that it takes to find out what is wrong
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_layout(name, tensor)
        if tensor.dim() not in ranks:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have {listed(tuple(map(str, ranks)))}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the device of query, {query.device}")
        if tensor.dtype not in DTYPES:
            names = listed(tuple(map(dtype_name, DTYPES)))
            raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be {names}")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {dtype_name(tensor.dtype)}; it must have that of query, {dtype_name(query.dtype)}"
            )
    if query.device.type not in DEVICES:
        raise NotImplementedError(
            f"query is on {query.device}; only mps and cpu tensors are supported: move it, or use "
            "torch.nn.functional.scaled_dot_product_attention"
        )


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Sizes of query [B,Hq,Lq,D], key [B,Hkv,Lk,D], value [B,Hkv,Lk,Dv]."""
    (batch, heads, _, dim), (key_batch, key_heads, length, key_dim) = query.shape, key.shape
    value_batch, value_heads, value_length, value_dim = value.shape
    if (
        not torch.compiler.is_compiling()  # or sizes may be symbols
        and (type(batch) is type(length) is type(value_length) is type(key_batch) is type(value_batch) is int)
        and (batch == key_batch == value_batch and key_heads == value_heads)
        and (length == value_length and dim == key_dim)
        and (heads == key_heads or (key_heads != 0 and heads % key_heads == 0))
        and (0 < dim <= LARGEST_HEAD_DIM and 0 < value_dim <= LARGEST_HEAD_DIM)
    ):
        return  # sooner than it takes to find out what is wrong
    for name, tensor in (("key", key), ("value", value)):
        if not holds(tensor.shape[0] == batch):
            raise ValueError(f"{name} has batch size {tensor.shape[0]}; it must be that of query, {batch}")
    if not holds(value.shape[1] == key_heads):
        raise ValueError(f"value has {value.shape[1]} heads; it must have those of key, {key_heads}")
    if not holds(value.shape[2] == length):
        raise ValueError(f"value has length {value.shape[2]}; it must have that of key, {length}")
    if not holds(key.shape[3] == dim):
        raise ValueError(f"key has head dimension {key.shape[3]}; it must have that of query, {dim}")
    check_heads_and_dims(query, "key", key, "value", value)


def check_heads_and_dims(query: Tensor, key_name: str, key: Tensor, value_name: str, value: Tensor) -> None:
    """That query heads share those of key, and that kernels have the head dimensions, which are last."""
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"query has {heads} heads; it must have a multiple of those of {key_name}, {key_heads}")
    sizes = query.shape[3], value.shape[3]
    for name, size in zip(("query", value_name), sizes, strict=True):
        if size == 0:
            raise ValueError(f"{name} has head dimension 0; it must be within 1 ... {LARGEST_HEAD_DIM}")
        if size > LARGEST_HEAD_DIM and sizes != LATENT_DIMS:
            raise NotImplementedError(
                f"{name} has head dimension {size}; it must be within 1 ... {LARGEST_HEAD_DIM}: use "
                "torch.nn.functional.scaled_dot_product_attention"
            )


def check_per_head(
    name: str,
    tensor: Tensor,
    query: Tensor,
    heads: int,
    dtypes: tuple[torch.dtype, ...],
    entries: tuple[str, int] | None = None,
) -> None:
    """A tensor [Hq], or with `entries` = ("B", B) also [B,Hq], on the query's device."""
    check_is_tensor(name, tensor)
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on the device of query, {query.device}")
    if tensor.dtype not in dtypes:
        names = listed(tuple(dict.fromkeys(map(dtype_name, dtypes))))
        raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be {names}")
    shapes = [(heads,)] if entries is None else [(heads,), (entries[1], heads)]
    if not any(equal(tensor.shape, shape) for shape in shapes):
        also = "" if entries is None else f" or [{entries[0]},Hq] = {[entries[1], heads]}"
        raise ValueError(f"{name} has shape {shape_of(tensor)}; it must have shape [Hq] = [{heads}]{also}")


def check_features(arguments: Dense | Varlen | Decode | Paged, entries: tuple[str, int], *, metal: bool) -> None:
    """What the families have in common besides the tensors that they are about.

    Args:
        entries: how many rows alibi_slopes may have, one for each entry, and their letter.
        metal: the Metal kernels are going to run.
    """
    query, sinks, alibi_slopes = arguments.query, arguments.sinks, arguments.alibi_slopes
    if sinks is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        check_per_head("sinks", sinks, query, query.shape[1], (torch.float32, wide))
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, query, query.shape[1], (torch.float32,), entries)
    check_scale(arguments.scale)
    if not 0 <= arguments.softcap < math.inf:
        raise ValueError(f"softcap is {arguments.softcap}; it must be 0 (off) or more, and finite")
    if metal and query.dtype not in METAL_DTYPES:
        names = listed(tuple(map(dtype_name, METAL_DTYPES)))
        raise TypeError(f"query has dtype {dtype_name(query.dtype)}; it must be {names}")


def check_scale(scale: float) -> None:
    if scale != scale:  # not math.isnan, which torch.compile can't trace where the scale is a symbol
        raise ValueError("scale is nan; it must be a number")


def check_dropout(arguments: Dense | Varlen, *, drawn: bool) -> None:
    """`drawn`: there must be an rng_state if there is dropout, for ops draw nothing themselves."""
    query, dropout_p, rng_state = arguments.query, arguments.dropout_p, arguments.rng_state
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; it must be within [0, 1)")
    if rng_state is None:
        if drawn and dropout_p > 0:
            raise ValueError(f"rng_state is None; it must be a tensor, since dropout_p is {dropout_p}")
        return
    if not dropout_p > 0:
        raise ValueError(f"rng_state is given; it must be None, since dropout_p is {dropout_p}")
    if rng_state.device != query.device:
        raise ValueError(f"rng_state is on {rng_state.device}; it must be on the device of query, {query.device}")
    if rng_state.dtype != torch.int64:
        raise TypeError(f"rng_state has dtype {dtype_name(rng_state.dtype)}; it must be int64")
    if rng_state.shape != (2,):
        raise ValueError(f"rng_state has shape {shape_of(rng_state)}; it must have shape [2]")


def check_results(
    backward: Backward, query: Tensor, shape_of_out: tuple[int, ...], shape_of_lse: tuple[int, ...]
) -> None:
    """What a backward op takes besides the arguments of its forward op."""
    for name, shape, dtype in (
        ("grad_out", shape_of_out, query.dtype),
        ("out", shape_of_out, query.dtype),
        ("correction", shape_of_out, torch.float16),
        ("grad_lse", shape_of_lse, torch.float32),
        ("lse", shape_of_lse, torch.float32),
    ):
        tensor = getattr(backward, name)
        if tensor is None:
            continue
        if not equal(tensor.shape, shape):
            raise ValueError(f"{name} has shape {shape_of(tensor)}; it must have shape {list(shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}; it must be {dtype_name(dtype)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on the device of query, {query.device}")


def widened(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """What users may give in the query's dtype, and ops take in that of the scores."""
    if not isinstance(sinks, Tensor) or sinks.dtype != query.dtype:
        return sinks
    return sinks.to(torch.promote_types(query.dtype, torch.float32))


def scale_of(query: Tensor, scale: float | None) -> float:
    """1/sqrt(D) for None; of a query without D, or a nested one, which are refused elsewhere, 1."""
    if scale is not None:
        return scale
    has_dim = query.dim() > 0 and not query.is_nested and query.shape[-1] > 0
    return 1 / math.sqrt(query.shape[-1]) if has_dim else 1.0
