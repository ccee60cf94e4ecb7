"""The compiled pipelines of the Metal backend: build them before they are needed, or forget them."""

from typing import Any

import torch

from . import _metal, _native

_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
_LENGTH = 1024  # any long one
_MANY_HEADS = 16  # of one key head: more than the smallest tile of the decode kernels holds


def precompile(
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    is_causal: bool = False,
    training: bool = False,
) -> int:
    """Compiles what attention on contiguous `mps` tensors of these properties runs, so that its first call doesn't.

    That is of long sequences, and of decoding steps over long ones.

    The pipelines are also archived on disk, so that later processes find them. `training` adds the backward pass.
    Returns the number of pipelines. Raises RuntimeError where the Metal kernels can't run, TypeError for another dtype.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; it must be torch.float16, torch.bfloat16 or torch.float32")
    problem = {
        "family": _info()["planned_family"],
        "dtype": _DTYPES[dtype],
        "query_length": _LENGTH,
        "key_length": _LENGTH,
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
        "window_right": 0 if is_causal else None,
    }
    step = problem | {"query_length": 1}
    launches = [*_native.plan(**problem).launches, *_native.plan(**step).launches]
    launches += _native.plan(**step, query_heads=_MANY_HEADS).launches[:1]  # and the same combine
    if training:
        launches += _native.plan_backward(**problem).launches
    _metal.precompile(launches)
    return len(launches)


def clear_cache() -> None:
    """Forgets the compiled pipelines, in memory and on disk; each is compiled again when it is next used.

    Raises RuntimeError where the Metal kernels can't run.
    """
    _info()
    _metal.clear_cache()


def _info() -> dict[str, Any]:
    info = _metal.info()
    why_not = ["this build of mfa has no Metal backend"] if info is None else info["why_not"]
    if info is None or why_not:
        raise RuntimeError(f"mfa's Metal kernels can't run here: {'; '.join(why_not)}")
    return info
