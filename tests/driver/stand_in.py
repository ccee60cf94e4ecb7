"""A pytest plugin: a stand-in `mps` device for torch on Linux, on which the package runs as it does on a Mac.

    python -m pytest -p driver.stand_in -m mps        (with tests/ in PYTHONPATH; in a process of its own)

Only mfa's own ops run Metal kernels there; torch's run on the CPU. A finding of the driver fails the test.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mfa
from mfa import _library

from . import build, control


def install() -> control.Driver:
    """Before anything asks torch for MPS: the answer is cached."""
    driver = control.Driver(build.driver())
    driver.reset(build.driver().with_name("libmfa_kernels_count.so"), mode="throw")
    ctypes.CDLL(str(build.mps_device()), mode=ctypes.RTLD_GLOBAL)
    torch._C._has_mps = True
    torch._C._mps_get_core_count = lambda: 8  # type: ignore[attr-defined]  # builds without MPS lack it
    if library := os.environ.get("MFA_LIBRARY_UNDER_TEST"):  # its kernels replace those of the package's libmfa
        torch.ops.load_library(library)
        packaged = _library.path_of
        _library.path_of = lambda name: Path(library) if name == "mfa" else packaged(name)
    return driver


DRIVER = install()


def pytest_sessionstart() -> None:
    assert mfa.is_available(), mfa.device_info().why_not


@pytest.fixture(autouse=True)
def no_driver_findings() -> Iterator[None]:
    DRIVER.library.mfa_driver_clear_findings()
    yield
    assert DRIVER.findings() == []
