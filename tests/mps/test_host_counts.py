"""What a call takes on the host between Python and Metal's encoder; what it costs in time, `make host-cost` prints."""

import pytest

pytestmark = [pytest.mark.mps, pytest.mark.usefixtures("stand_in")]


def test_counts_of_a_call() -> None:
    from driver import host_counts  # which loads the stand-in device

    counts = host_counts.measure()
    # Beyond those of attention_forward: Python looks at the three tensors once, and calls that op.
    for name, functions, crossings in (("mfa.attention", 4, 21), ("torch.ops.mfa.attention", 3, 10)):
        assert counts[name]._replace(functions=0, crossings=0) == counts["attention_forward"]
        assert (counts[name].functions, counts[name].crossings) == (functions, crossings)
    forward = counts["attention_forward"]
    assert forward.functions == forward.crossings == 0
    assert forward.tensors == 2  # out and lse
    # Pipeline, five buffers, two sets of bytes, dispatch, and the group that names it.
    assert forward.messages == 1 + 5 + 2 + 1 + 2
    assert forward.heap <= 12  # less than half of them are not the handles of torch's stable ABI
    decode = counts["attention_decode"]
    assert decode.functions == decode.crossings == 0
    assert decode.tensors == 2 + 2  # and what the parts of the cache leave to be merged
    assert decode.messages <= 28
    assert decode.heap <= 20
    append = counts["attention_append"]
    assert append.functions == append.crossings == 0
    assert append.tensors == 2  # the rotated query and the new lengths
    assert append.messages == 1 + 10 + 2 + 1 + 2  # as of forward, with ten buffers
    assert append.heap <= 20
    # Nothing but checks, and these two ops.
    both = counts["attention_with_kv_cache"]
    assert both.tensors == append.tensors + decode.tensors
    assert both.messages == append.messages + decode.messages
