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


@dataclass(frozen=True)
class Device:
    """Where tensors are, and what has to be active for the kernels to be meant."""

    name: str

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
            return mfa.simulate(checks=("races", "bounds", "uninitialised"), seed=seed)
        return nullcontext()

    def why_not(self) -> str | None:
        if self.name == "mps":
            return mfa.device_info().why_not
        return mfa.simulator.why_not() if self.name == "simulator" else None


@pytest.fixture(params=["cpu", "simulator", pytest.param("mps", marks=pytest.mark.mps)])
def device(request: pytest.FixtureRequest) -> Device:
    """Each device that there is; skips with the reason why there isn't."""
    chosen = Device(request.param)
    reason = chosen.why_not()
    if reason is not None:
        pytest.skip(reason)
    return chosen


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
