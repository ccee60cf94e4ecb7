"""A pytest plugin: a stand-in `mps` device for torch on Linux, on which the package runs as it does on a Mac.

    python -m pytest -p driver.stand_in -m mps        (with tests/ in PYTHONPATH; in a process of its own)

Only mfa's own ops run Metal kernels there; torch's run on the CPU. A finding of the driver fails the test.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from . import build, control


def install() -> control.Driver:
    """Before anything asks torch for MPS: the answer is cached."""
    driver = control.Driver(build.driver())
    driver.reset(build.driver().with_name("libmfa_kernels_count.so"), mode="throw")
    ctypes.CDLL(str(build.mps_device()), mode=ctypes.RTLD_GLOBAL)
    torch._C._has_mps = True
    torch._C._mps_get_core_count = lambda: 8  # type: ignore[attr-defined]  # builds without MPS lack it
    assert torch.backends.mps.is_available()
    return driver


DRIVER = install()


@pytest.fixture(autouse=True)
def no_driver_findings() -> Iterator[None]:
    DRIVER.library.mfa_driver_clear_findings()
    yield
    assert DRIVER.findings() == []
