"""Numbers as users have them: whatever F.scaled_dot_product_attention takes for a scale, and Python for an index."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mfa
from mfa.flash_attn import flash_attn_func

QUERY, KEY, VALUE = torch.randn(3, 1, 2, 5, 16)
PACKED = [tensor[0].transpose(0, 1) for tensor in (QUERY, KEY, VALUE)]
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)

REALS = [np.float32, np.float64, np.float16, torch.tensor, Fraction]
INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor]


def varlen(longest: Any = 3, **terms: Any) -> Tensor:
    return mfa.attention_varlen(*PACKED, STARTS, STARTS, longest, longest, **terms)


def cached(cache_seqlens: Any = 5, **terms: Any) -> Tensor:
    return mfa.attention_with_kv_cache(QUERY[:, :, :1], KEY, VALUE, cache_seqlens=cache_seqlens, **terms)


def dense(**terms: Any) -> Tensor:
    return mfa.attention(QUERY, KEY, VALUE, **terms)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("function", [dense, varlen, cached])
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_reals(function: Callable[..., Tensor], name: str, real: Callable[[float], Any]) -> None:
    assert torch.equal(function(**{name: real(0.125)}), function(**{name: 0.125}))


@pytest.mark.parametrize("real", REALS)
def test_dropout(real: Callable[[float], Any]) -> None:
    torch.manual_seed(0)
    out = dense(dropout_p=real(0.25))
    torch.manual_seed(0)
    assert torch.equal(out, dense(dropout_p=0.25))


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers(integer: Callable[[int], Any]) -> None:
    window = (integer(2), integer(1))
    for function in (dense, varlen, cached):
        assert torch.equal(function(window=window), function(window=(2, 1)))
    heads_last = [tensor.transpose(1, 2) for tensor in (QUERY, KEY, VALUE)]
    assert torch.equal(
        flash_attn_func(*heads_last, window_size=window), flash_attn_func(*heads_last, window_size=(2, 1))
    )
    assert torch.equal(varlen(integer(3)), varlen(3))
    assert torch.equal(cached(num_splits=integer(2)), cached(num_splits=2))
    if integer is not torch.tensor:  # a tensor has a length per batch entry
        assert torch.equal(cached(integer(4)), cached(4))


@pytest.mark.parametrize("value", [True, "1", 1j, torch.tensor([0.5]), torch.tensor(True), None.__class__])
def test_what_is_no_number(value: Any) -> None:
    for name in ("scale", "softcap", "dropout_p"):
        with pytest.raises(TypeError, match=f"^{name} is .*; it must be a number"):
            dense(**{name: value})


@pytest.mark.parametrize("value", [True, 3.0, "3", np.float32(3), torch.tensor(3.0), torch.tensor(True), torch.ones(2)])
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^max_seqlen_q is .*; it must be an integer"):
        varlen(value)
    with pytest.raises(TypeError, match=r"^window is .*; its entries must be integers or None"):
        dense(window=(value, 0))
