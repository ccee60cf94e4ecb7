"""The devices that a test runs on, and hypothesis's settings."""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import mfa

settings.register_profile("mfa", deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("mfa")
torch.set_num_threads(1)  # pytest-xdist brings the processes

WHY_NO_SIMULATOR = mfa.simulator.why_not()
SIMULATOR = pytest.param("simulator", marks=pytest.mark.simulator)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, before any fixture, what needs a part that this build of mfa leaves out."""
    if WHY_NO_SIMULATOR is not None and item.get_closest_marker("simulator"):
        pytest.skip(WHY_NO_SIMULATOR)


@pytest.fixture(autouse=True)
def no_simulator_without_the_mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that simulates but isn't marked `simulator` would fail on every Mac: let it fail here too."""
    if not request.node.get_closest_marker("simulator"):
        monkeypatch.setattr(mfa.simulator, "why_not", lambda: WHY_NO_SIMULATOR or "the test lacks the mark `simulator`")


@dataclass(frozen=True)
class Device:
    """Where tensors are, and what has to be active for the kernels to be meant."""

    name: str
    family: str = "apple7"  # of the simulator

    @property
    def type(self) -> str:
        return "mps" if self.name == "mps" else "cpu"

    @property
    def has_kernels(self) -> bool:
        """Whether the Metal kernels run."""
        return self.name != "cpu"

    def active(self, seed: int = 0) -> AbstractContextManager[object]:
        """Inside it, tensors of `type` are computed by the device. The simulator makes all of its checks."""
        if self.name == "simulator":
            return mfa.simulate(self.family, checks=("races", "bounds", "uninitialised"), seed=seed)
        return nullcontext()


@pytest.fixture(params=["cpu", SIMULATOR, pytest.param("mps", marks=pytest.mark.mps)])
def device(request: pytest.FixtureRequest) -> Device:
    """Each device that there is."""
    if request.param == "mps":
        request.getfixturevalue("mps")
    return Device(request.param)


@pytest.fixture(name="mps", scope="session")
def require_mps() -> None:
    if not mfa.is_available():
        pytest.skip(f"no mps device: {mfa.device_info().why_not}")


@pytest.fixture(name="stand_in", scope="session")
def loaded_stand_in(mps: None) -> Any:
    """The plugin driver.stand_in, whose DRIVER counts and can be steered."""
    if sys.platform != "linux":
        pytest.skip("only the software driver counts, and can be steered")
    from driver import stand_in

    return stand_in
