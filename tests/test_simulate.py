"""mfa.simulate: what it reports, refuses, and leaves behind."""

import threading
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import mfa
from mfa import _native

pytestmark = pytest.mark.simulator

# Names that users and tests rely on.
COUNTERS = {
    "mma",
    "unit_mma",
    "exp",
    "shuffles",
    "reductions",
    "threadgroup_barriers",
    "simdgroup_barriers",
    "fragment_loads",
    "device_read_bytes",
    "device_write_bytes",
    "threadgroup_read_bytes",
    "threadgroup_write_bytes",
}
CHECKS = ("races", "bounds", "uninitialised")


@pytest.fixture
def tensors() -> list[Tensor]:
    return [torch.randn(1, 2, 70, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_launches_say_what_the_plan_says(tensors: list[Tensor]) -> None:
    with mfa.simulate(family="apple9") as simulation:
        mfa.attention(*tensors, is_causal=True)
    (launch,) = simulation.launches
    sizes = {"query_length": 70, "key_length": 70, "head_dim": 64, "value_dim": 64, "query_heads": 2, "key_heads": 2}
    (planned,) = _native.plan(family="apple9", dtype="f32", window_right=0, **sizes).launches
    assert (launch.kernel, launch.grid, launch.group) == (planned.kernel, planned.grid, planned.group)
    assert launch.constants == dict(planned.constants)
    assert launch.threadgroup_memory <= planned.threadgroup_memory


def test_counters_sum_over_launches(tensors: list[Tensor]) -> None:
    assert {field.name for field in fields(mfa.Counters)} >= COUNTERS
    with mfa.simulate() as simulation:
        assert simulation.launches == []
        assert simulation.counters == mfa.Counters()
        mfa.attention(*tensors)
        mfa.attention(*tensors, is_causal=True)
    first, second = (launch.counters for launch in simulation.launches)
    assert simulation.counters == first + second
    assert 0 < second.mma < first.mma
    assert first.device_read_bytes > 0


def test_the_family_chooses_the_plan(tensors: list[Tensor]) -> None:
    kernels = set()
    for family in ("apple7", "apple8", "apple9", "apple10"):
        with mfa.simulate(family) as simulation:
            mfa.attention(*tensors)
        kernels.add(simulation.launches[0].kernel)
    assert len(kernels) > 1


def test_without_counters(tensors: list[Tensor]) -> None:
    with mfa.simulate(counters=False) as fast:
        out = mfa.attention(*tensors)
    assert fast.counters == mfa.Counters()
    with mfa.simulate(counters=False, checks=("races",)) as checked:
        torch.testing.assert_close(mfa.attention(*tensors), out, rtol=0, atol=0)
    assert checked.launches[0].kernel == fast.launches[0].kernel


def test_a_seed_repeats(tensors: list[Tensor]) -> None:
    for seed in (0, 5, 2**64 - 1):
        results = []
        for _ in range(2):
            with mfa.simulate(seed=seed, checks=CHECKS) as simulation:
                results.append((mfa.attention(*tensors), simulation.counters))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


def test_simulations_do_not_nest(tensors: list[Tensor]) -> None:
    with mfa.simulate() as outer:
        with pytest.raises(RuntimeError, match="already; simulations don't nest"), mfa.simulate():
            pass
        mfa.attention(*tensors)
    assert len(outer.launches) == 1


def test_it_ends_with_the_block(tensors: list[Tensor]) -> None:
    expected = mfa.attention(*tensors)
    with pytest.raises(ZeroDivisionError), mfa.simulate() as simulation:
        raise ZeroDivisionError
    assert torch.equal(mfa.attention(*tensors), expected)
    assert simulation.launches == []
    with mfa.simulate() as again:
        mfa.attention(*tensors)
    assert len(again.launches) == 1


def test_a_simulation_can_be_entered_again(tensors: list[Tensor]) -> None:
    simulation = mfa.simulate()
    for count in (1, 2):
        with simulation:
            mfa.attention(*tensors)
        assert len(simulation.launches) == count


def test_threads_share_it(tensors: list[Tensor]) -> None:
    results: list[Tensor] = []
    with mfa.simulate(counters=False) as simulation:
        expected = mfa.attention(*tensors)
        threads = [threading.Thread(target=lambda: results.append(mfa.attention(*tensors))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(simulation.launches) == 5
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"family": "apple6"}, "family is 'apple6'; it must be one of apple7, apple8, apple9, apple10"),
        ({"checks": ("races", "speed")}, "checks has 'speed'; each must be one of races, bounds, uninitialised"),
        ({"checks": "speed"}, "checks has 'speed'; each must be one of races, bounds, uninitialised"),
        ({"seed": -1}, "seed is -1; it must be within"),
    ],
)
def test_arguments(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^" + sentence.replace("(", r"\(")):
        mfa.simulate(**arguments)  # type: ignore[arg-type]


def test_one_check_may_be_a_string(tensors: list[Tensor]) -> None:
    with mfa.simulate(checks="races"):
        mfa.attention(*tensors)


def test_an_error_without_a_finding_is_passed_on(tensors: list[Tensor]) -> None:
    with mfa.simulate(), pytest.raises(RuntimeError) as raised:
        torch.ops.mfa.attention(*tensors, attn_mask=torch.zeros(3, 3))
    assert not isinstance(raised.value, mfa.SimulationError)


class Finding:
    """Stands for a native simulator whose last dispatch broke a rule."""

    finding = "race in forward_f32 (forward.h:1)"


def test_a_finding_becomes_a_simulation_error() -> None:
    simulation = mfa.Simulation(Finding())  # type: ignore[arg-type]

    def fail(message: str) -> None:
        raise RuntimeError(message)

    with pytest.raises(mfa.SimulationError, match=r"^race in forward_f32 \(forward.h:1\)$"):
        simulation.run(lambda: fail(Finding.finding))
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        simulation.run(lambda: fail("out of memory"))


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_native, "Simulator")
    assert "no simulator" in str(mfa.simulator.why_not())
    with pytest.raises(RuntimeError, match=r"^this build of mfa has no simulator"):
        mfa.simulate()
