"""Operation budgets: what the kernels may cost, counted by the simulator. A count may fall, never rise.

Units are those of mfa.Counters. One head, float16, contiguous, unless a test says otherwise.
The budgets of D 64 and 128 are those of a hand count: 8x8x8 MMAs, one 16-byte load per four fragments of Q, K and V.
"""

import pytest
import torch

import mfa
from mfa import _library

pytestmark = pytest.mark.simulator

MMA_VOLUME = 8 * 8 * 8


def count(length, dim, *, dtype=torch.float16, family="apple7", **kwargs):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, dim, generator=generator).to(dtype) for _ in range(3))
    with mfa.simulate(family) as sim:
        mfa.attention(query, key, value, return_lse=True, **kwargs)
    (launch,) = sim.launches
    return sim.counters, launch


def dense_mmas(length, dim):
    return 2 * length * length * dim // MMA_VOLUME


def test_dense_d64():
    counters, launch = count(256, 64)
    simdgroups = 16
    assert counters.mma == dense_mmas(256, 64) == 16384
    assert counters.fragment_loads <= 65_536 + 2 * 32 * 32  # K and V, and Q once
    assert counters.threadgroup_read_bytes <= 1_048_576
    assert counters.threadgroup_write_bytes <= 131_072
    assert counters.device_read_bytes <= 163_840
    assert counters.device_write_bytes <= 32_768 + 1_024
    assert 65_536 <= counters.exp <= 73_728
    assert counters.shuffles <= 576
    assert counters.reductions <= 128
    assert counters.threadgroup_barriers <= 15 * simdgroups
    assert counters.simdgroup_barriers == 0
    assert counters.conversions == 0
    assert launch.threadgroup_memory == 9_216


def test_dense_d128():
    counters, launch = count(256, 128)
    simdgroups = 32
    assert counters.mma == dense_mmas(256, 128) == 32_768
    assert counters.threadgroup_read_bytes <= 4_194_304
    assert counters.threadgroup_write_bytes <= 524_288
    assert counters.device_read_bytes <= 589_824
    assert counters.device_write_bytes <= 65_536 + 1_024
    assert 65_536 <= counters.exp <= 73_728
    assert counters.shuffles <= 576
    assert counters.reductions <= 256
    assert counters.threadgroup_barriers <= 15 * simdgroups
    assert counters.simdgroup_barriers == 0
    assert counters.conversions == 0
    assert launch.threadgroup_memory == 17_408


def test_direct_reads_no_threadgroup_memory():
    name = "forward_f16_d64_v64_direct_s4_r2_k32"
    _library.prefer_instance(name)
    try:
        counters, launch = count(256, 64, family="apple9")
    finally:
        _library.prefer_instance(None)
    assert launch.kernel == name
    assert counters.mma == dense_mmas(256, 64)
    assert counters.threadgroup_read_bytes == counters.threadgroup_barriers == launch.threadgroup_memory == 0
    assert counters.device_read_bytes <= 1_048_576 + 32_768


@pytest.mark.parametrize("family", ["apple7", "apple9"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_causal_skips_what_no_row_sees(family, dtype):
    counters, _ = count(1024, 64, family=family, dtype=dtype, is_causal=True)
    assert counters.mma <= 0.56 * dense_mmas(1024, 64)


def test_causal_skips_by_simdgroup():
    counters, _ = count(256, 64, is_causal=True)
    assert counters.mma == 9_216


def test_window_skips_key_blocks():
    counters, _ = count(2048, 64, window=(128, 0))
    assert counters.mma <= 0.15 * dense_mmas(2048, 64)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_instance_does_the_minimum_of_mmas(dim, dtype):
    counters, _ = count(128, dim, dtype=dtype)
    assert counters.mma == dense_mmas(128, dim)
    assert counters.simdgroup_barriers == counters.conversions == 0


def test_grouped_heads_read_no_expanded_copy():
    query = torch.randn(1, 4, 64, 64, dtype=torch.float16)
    key = torch.randn(1, 1, 128, 64, dtype=torch.float16)
    with mfa.simulate() as sim:
        mfa.attention(query, key, key, enable_gqa=True)
    assert sim.counters.device_read_bytes == 2 * (query.numel() + 4 * 2 * key.numel())


def both_passes(length=256, **kwargs):
    """The launches of forward and backward, but for those that classify a mask."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 64, generator=generator).half().requires_grad_() for _ in range(3))
    with mfa.simulate() as sim:
        mfa.attention(query, key, value, **kwargs).sum().backward()
    return [launch for launch in sim.launches if "mask_blocks" not in launch.kernel]


def total(launches):
    return sum((launch.counters for launch in launches), mfa.Counters())


NEUTRAL = {
    "window": {"window": (256, 255)},
    "is_causal": {"is_causal": True, "window": (None, 0)},  # as one of them alone
    "softcap": {"softcap": 0.0},
    "dropout_p": {"dropout_p": 0.0},
}


@pytest.mark.parametrize("feature", NEUTRAL)
def test_a_feature_that_is_off_costs_nothing(feature):
    launches, plain = both_passes(**NEUTRAL[feature]), both_passes(is_causal="is_causal" in NEUTRAL[feature])
    assert total(launches) == total(plain)
    # What isn't counted, comparisons say, is compiled away.
    assert [launch.constants for launch in launches] == [launch.constants for launch in plain]


@pytest.mark.parametrize(
    "feature",
    [
        {"attn_mask": torch.ones(256, 256, dtype=torch.bool)},
        {"attn_mask": torch.ones(256, 256, dtype=torch.float16)},
        {"attn_mask": torch.ones(1, 256)},
        {"alibi_slopes": torch.ones(1)},
        {"sinks": torch.ones(1)},
        {"softcap": 5.0},
        {"dropout_p": 0.5},
    ],
    ids=lambda feature: "-".join(f"{k}-{getattr(v, 'dtype', v)}" for k, v in feature.items()),
)
def test_a_feature_costs_no_barrier_and_no_mma(feature):
    plain, counters = total(both_passes()), total(both_passes(**feature))
    assert counters.threadgroup_barriers == plain.threadgroup_barriers
    assert (counters.mma, counters.simdgroup_barriers) == (plain.mma, 0)


def test_a_document_mask_costs_what_it_leaves_open():
    document = torch.arange(1024) // 128
    masked = total(both_passes(1024, attn_mask=document[:, None] == document))
    assert masked.mma <= 0.25 * total(both_passes(1024)).mma
