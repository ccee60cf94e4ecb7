"""What appending to a cache refuses, before anything is written."""

import torch
from torch import Tensor

from .._arguments import Append
from .cache import check_decode, check_lengths, check_new_tokens
from .indices import check_index_tensor, host_values
from .sizes import equal, holds
from .tensors import check_is_tensor, dtype_name


def check_append(arguments: Append, *, metal: bool) -> None:
    """Everything about the arguments of `mfa::attention_append` but what contents tell."""
    decode = arguments.decode()
    check_decode(decode, metal=metal)
    check_new_tokens(decode, arguments.key, arguments.value)
    if arguments.cache_lengths is not None:
        check_index_tensor(
            "cache_lengths", arguments.cache_lengths, arguments.query, "[B]", (arguments.query.shape[0],)
        )
    check_rotary(arguments.query, arguments.rotary_cos, arguments.rotary_sin, arguments.rotary_seqlens)


def check_contents(arguments: Append) -> None:
    """What the contents of index tensors tell, where the host sees them."""
    new = arguments.key.shape[2]
    name = "cache_length" if arguments.cache_lengths is None else "cache_lengths"
    lengths = arguments.cache_length if arguments.cache_lengths is None else arguments.cache_lengths
    check_lengths(name, lengths, new, arguments.decode())
    if arguments.rotary_cos is not None:
        starts = lengths if arguments.rotary_seqlens is None else arguments.rotary_seqlens
        check_positions(arguments.query, new, arguments.rotary_cos, starts, advance=arguments.queries_advance)


def check_rotary(query: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor | None) -> None:
    """Tables [positions,R/2], both or none; and int32 [B], where the first new tokens aren't at cache_seqlens."""
    if (cos is None) != (sin is None):
        given, missing = ("rotary_sin", "rotary_cos") if cos is None else ("rotary_cos", "rotary_sin")
        raise ValueError(f"{missing} is None, and {given} is given; both or none must be")
    if cos is None or sin is None:
        if starts is not None:
            raise ValueError("rotary_seqlens is given, and rotary_cos is None; both or none must be")
        return
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_is_tensor(name, table)
        if table.device != query.device:
            raise ValueError(f"{name} is on {table.device}; it must be on the device of query, {query.device}")
        if table.dtype not in (query.dtype, torch.float32):
            names = " or ".join(dict.fromkeys(map(dtype_name, (query.dtype, torch.float32))))
            raise TypeError(f"{name} has dtype {dtype_name(table.dtype)}; it must be {names}")
        if table.dim() != 2:
            raise ValueError(f"{name} has shape {list(table.shape)}; it must have shape [positions,R/2]")
    if sin.dtype != cos.dtype:
        found = dtype_name(sin.dtype)
        raise TypeError(f"rotary_sin has dtype {found}; it must have that of rotary_cos, {dtype_name(cos.dtype)}")
    if not equal(sin.shape, cos.shape):
        raise ValueError(f"rotary_sin has shape {list(sin.shape)}; it must have that of rotary_cos, {list(cos.shape)}")
    if not holds(2 * cos.shape[1] <= query.shape[3]):
        raise ValueError(
            f"rotary_cos has {cos.shape[1]} columns; they must be at most half of the head dimension {query.shape[3]}"
        )
    if not holds(cos.shape[0] >= 1):
        raise ValueError("rotary_cos has 0 positions; it must have one at least")
    if starts is not None:
        check_index_tensor("rotary_seqlens", starts, query, "[B]", (query.shape[0],))


def check_positions(query: Tensor, new: int, cos: Tensor, starts: Tensor | int, *, advance: bool) -> None:
    """That the tables have the positions of all new tokens, and of the queries."""
    values = host_values(starts) if isinstance(starts, Tensor) else [starts] * query.shape[0]
    tokens = max(new, query.shape[2] if advance else min(query.shape[2], 1)) if values else 0
    for entry, value in enumerate(values or ()):
        if not (holds(value >= 0) and holds(value <= cos.shape[0] - tokens)):
            raise ValueError(
                f"rotary_cos has {cos.shape[0]} positions; it must have those of {tokens} tokens from {value} on, for "
                f"batch entry {entry}"
            )
