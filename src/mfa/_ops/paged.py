"""The op of packed attention over pages."""

import itertools
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .._arguments import Paged
from .._checks.indices import host_values
from .._checks.paged import capacity, check_paged, check_paged_contents
from .._cpu.paged import attention_varlen_paged
from .._cpu.varlen import empty_outputs
from . import inference
from .library import LIBRARY, ops
from .vmap import Dims, Results, one_by_one


def _paged_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    return one_by_one(ops.attention_varlen_paged, info.batch_size, in_dims, args)


def _paged_flops(*args: Any, **_: Any) -> int:
    """Exactly where the host sees the lengths, and at most elsewhere."""
    arguments = Paged(*args)
    tokens, heads, dim = arguments.query.shape
    starts, lengths = host_values(arguments.cu_seqlens_q), host_values(arguments.seqused_k)
    if starts is None or lengths is None:
        pairs = tokens * min(arguments.max_seqlen_k, capacity(arguments))
    else:
        pairs = sum((b - a) * keys for (a, b), keys in zip(itertools.pairwise(starts), lengths, strict=True))
    return 2 * heads * pairs * (dim + arguments.value.shape[3])


inference.register(
    "attention_varlen_paged",
    Paged,
    check=check_paged,
    check_contents=check_paged_contents,
    on_cpu=attention_varlen_paged,
    empty_outputs=lambda arguments: empty_outputs(arguments.query, arguments.value.shape[3]),
    cast=("query",),
    caches=("key", "value"),
)
inference.refuse_gradients(
    "attention_varlen_paged",
    "attention over pages has no gradients: use mfa.attention_varlen without block_table",
)
torch.library.register_vmap("mfa::attention_varlen_paged", _paged_vmap, lib=LIBRARY)
register_flop_formula(ops.attention_varlen_paged, get_raw=True)(_paged_flops)
