"""The op that appends to a cache."""

from typing import Any

import torch

from .._arguments import Append
from .._checks.append import check_append, check_contents
from .._checks.cache import check_no_grad
from .._cpu.append import attention_append
from .._cpu.layout import empty_outputs
from . import autograd, inference
from .library import LIBRARY, ops
from .vmap import Dims, Results

_APPEND = "mfa::attention_append"
_MUTABLE = ("key_cache", "value_cache", "key_scale", "value_scale")


def _empty_outputs(arguments: Append) -> inference.Outputs:
    query = arguments.query
    rotated = query.new_empty(0) if arguments.rotary_cos is None else empty_outputs(query, query.shape[3])[0]
    return rotated, query.new_empty(query.shape[0], dtype=torch.int32)


def _append_autograd(keyset: Any, *args: Any) -> inference.Outputs:
    arguments = Append(*args)
    autograd.refuse_tangents(_APPEND, args)
    if torch.is_grad_enabled():
        check_no_grad(arguments)
    for name in _MUTABLE:  # as an in-place operation does it
        if (tensor := getattr(arguments, name)) is not None:
            torch.autograd.graph.increment_version(tensor)
    outputs: inference.Outputs = autograd.redispatch(ops.attention_append.default, keyset, args)
    return outputs


def _append_vmap(info: Any, in_dims: Dims, *args: Any) -> Results:
    raise NotImplementedError(
        "key and value can't be appended to a cache inside torch.vmap: make the mapped dimension part of the batch"
    )


inference.register(
    "attention_append",
    Append,
    check=check_append,
    check_contents=check_contents,
    on_cpu=attention_append,
    empty_outputs=_empty_outputs,
    cast=("query", "key", "value"),
    caches=("key_cache", "value_cache"),
)
LIBRARY.impl("attention_append", _append_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap(_APPEND, _append_vmap, lib=LIBRARY)
