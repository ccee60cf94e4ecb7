"""What attention refuses, and how its arguments broadcast, with the sentences of tensors.py."""

import torch
from torch import Tensor

from .. import _simulation
from .._arguments import Dense
from .sizes import holds, is_known
from .tensors import (
    LARGEST_HEAD_DIM,
    METAL_DTYPES,
    check_dropout,
    check_features,
    check_is_tensor,
    check_layout,
    check_per_head,
    check_shapes,
    check_tensors,
    dtype_name,
    listed,
    shape_of,
    widened,
)


def is_plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> bool:
    """Whether there is nothing to refuse or to broadcast. (The op below has its own autocast.)"""
    return (
        type(query) is type(key) is type(value) is Tensor
        and ((query.is_mps and key.is_mps and value.is_mps) or (query.is_cpu and key.is_cpu and value.is_cpu))
        and query.layout is key.layout is value.layout is torch.strided
        and query.dtype is key.dtype is value.dtype
        and query.dtype in METAL_DTYPES
        and (query.is_mps or not (query.is_nested or key.is_nested or value.is_nested))
        and have_plain_shapes(query, key, value, enable_gqa)
        and (attn_mask is None or (not torch.compiler.is_compiling() and _is_plain_mask(attn_mask, query, key)))
    )


def _is_plain_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    if type(mask) is not Tensor or mask.dim() != 4 or mask.layout is not torch.strided or mask.is_nested:
        return False
    batch, heads, rows, columns = mask.shape
    full_batch, full_heads, full_rows, _ = query.shape
    return (
        (mask.dtype is torch.bool or mask.dtype is query.dtype or mask.dtype is torch.float32)
        and mask.device == query.device
        and (columns in (1, key.shape[2]) and rows in (1, full_rows))
        and (heads in (1, full_heads) and batch in (1, full_batch))
    )


def have_plain_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool = False) -> bool:
    """Whether the op takes the shapes as they are."""
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(query_shape) == len(key_shape) == len(value_shape) == 4:
        return False
    batch, heads, _, dim = query_shape
    key_batch, key_heads, length, key_dim = key_shape
    value_batch, value_heads, value_length, value_dim = value_shape
    return (
        (batch == key_batch == value_batch and key_heads == value_heads)
        and (heads == key_heads or (enable_gqa and key_heads != 0 and heads % key_heads == 0))
        and (length == value_length and dim == key_dim)
        and (0 < dim <= LARGEST_HEAD_DIM and 0 < value_dim <= LARGEST_HEAD_DIM)
    )


def check_forward(arguments: Dense, *, metal: bool, drawn: bool = False) -> None:
    """Everything about the arguments of `mfa::attention_forward`.

    Args:
        metal: the Metal kernels are going to run.
        drawn: as in `check_dropout`.
    """
    check_tensors(arguments.query, arguments.key, arguments.value, ranks=(4,))
    check_terms(arguments, metal=metal, drawn=drawn)


def check_terms(arguments: Dense, *, metal: bool, drawn: bool = False, bias_name: str = "bias") -> None:
    """The part of `check_forward` that is left after `check_tensors`."""
    query, key, bias = arguments.query, arguments.key, arguments.bias
    check_shapes(query, key, arguments.value)
    if bias is not None:
        check_bias(bias_name, bias, query, key)
        if bias.dim() != 4:
            raise ValueError(f"{bias_name} has {bias.dim()} dimensions; it must have 4")
    if arguments.block_mask is not None:
        check_block_mask(arguments.block_mask, query, bias, bias_name)
    check_features(arguments, ("B", query.shape[0]), metal=metal)
    check_dropout(arguments, drawn=drawn)


def check_bias(name: str, bias: Tensor, query: Tensor, key: Tensor) -> None:
    """A mask, or additive bias, that broadcasts to [B,Hq,Lq,Lk]."""
    check_is_tensor(name, bias)
    check_layout(name, bias)
    if bias.device != query.device:
        raise ValueError(f"{name} is on {bias.device}; it must be on the device of query, {query.device}")
    if bias.dtype not in (torch.bool, torch.float32, query.dtype):
        names = tuple(dict.fromkeys(["bool", "float32", dtype_name(query.dtype)]))
        raise TypeError(f"{name} has dtype {dtype_name(bias.dtype)}; it must be {listed(names)}")
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(bias.shape), reversed(full), strict=False)
    if bias.dim() > 4 or not all(is_known(size == 1) or holds(size == whole) for size, whole in sizes):
        raise ValueError(f"{name} has shape {shape_of(bias)}; it must broadcast to [B,Hq,Lq,Lk] = {list(full)}")


def check_block_mask(data: Tensor, query: Tensor, bias: Tensor | None, bias_name: str) -> None:
    """The data of a PackedBlockMask, as far as shapes tell."""
    if bias is not None:
        raise ValueError(f"{bias_name} and block_mask are both given; at most one may be")
    check_is_tensor("block_mask", data)
    check_layout("block_mask", data)
    if data.device != query.device:
        raise ValueError(f"block_mask is on {data.device}; it must be on the device of query, {query.device}")
    if data.dtype != torch.int32:
        raise TypeError(f"block_mask has dtype {dtype_name(data.dtype)}; it must be int32")
    if data.dim() != 1 or not is_known(data.stride(0) == 1):
        raise ValueError(f"block_mask has shape {shape_of(data)}; it must be what pack_block_mask makes")


def checked(arguments: Dense, enable_gqa: bool) -> Dense:
    """The arguments of `attention` as the op takes them, or one of the errors that it documents.

    Args:
        arguments: of any shapes that broadcast, with attn_mask as bias.
    """
    check_tensors(arguments.query, arguments.key, arguments.value, ranks=(3, 4))
    query, key, value = _broadcast(arguments.query, arguments.key, arguments.value, enable_gqa)
    bias, sinks = arguments.bias, arguments.sinks
    if bias is not None:
        check_bias("attn_mask", bias, query, key)
        bias = bias[(None,) * (4 - bias.dim())]
    if sinks is not None:
        check_per_head("sinks", sinks, query, query.shape[1], (torch.float32, query.dtype))
    arguments = arguments._replace(query=query, key=key, value=value, bias=bias, sinks=widened(sinks, query))
    check_terms(arguments, metal=_simulation.runs_kernels(query), bias_name="attn_mask")
    return arguments


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views with 4 dimensions and one batch size; with heads that the op takes, or else left for it to refuse."""
    tensors = [tensor if tensor.dim() == 4 else tensor.unsqueeze(0) for tensor in (query, key, value)]
    batch = _common([tensor.shape[0] for tensor in tensors], "batch size {}; it must be 1 or that of {}, {}")
    query, key, value = (_expanded(tensor, 0, batch) for tensor in tensors)
    if not enable_gqa:
        what = "{} heads; it must have 1, or those of {}, {}, unless enable_gqa is True"
        heads = _common([tensor.shape[1] for tensor in (query, key, value)], what)
        query = _expanded(query, 1, heads)
    if not is_known(key.shape[1] == value.shape[1]):  # one of them has a single head
        key_heads = _common([1, key.shape[1], value.shape[1]], "{} heads; it must have 1, or those of {}, {}")
        key, value = _expanded(key, 1, key_heads), _expanded(value, 1, key_heads)
    return query, key, value


def _expanded(tensor: Tensor, dim: int, size: int) -> Tensor:
    if is_known(tensor.shape[dim] == size):
        return tensor
    sizes = [-1] * 4
    sizes[dim] = size
    return tensor.expand(sizes)


def _common(sizes: list[int], what: str) -> int:
    """The size that the sizes of query, key and value broadcast to."""
    names = ("query", "key", "value")
    common, owner = 1, "query"
    for name, size in zip(names, sizes, strict=True):
        if is_known(common == 1):
            common, owner = size, name
        elif not (is_known(size == 1) or holds(size == common)):
            raise ValueError(f"{name} has " + what.format(size, owner, common))
    return common
