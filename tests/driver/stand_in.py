"""A pytest plugin: a stand-in `mps` device for torch on Linux, on which the package runs as it does on a Mac.

    python -m pytest -p driver.stand_in -m mps        (with tests/ in PYTHONPATH; in a process of its own)

Only mfa's own ops run Metal kernels there; torch's run on the CPU. A finding of the driver fails the test.
"""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from . import build, control


def driver_library() -> str:
    """The package's driver, which libmfa is linked with; without one, the tests' own."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("mfa._native")
    packaged = Path(spec.origin).with_name("libmfa_driver.so") if spec and spec.origin else None
    return str(packaged if packaged and packaged.exists() else build.driver())


def install() -> control.Driver:
    """Before anything asks torch for MPS: the answer is cached."""
    from pathlib import Path

    device = build.mps_device()
    library = Path(driver_library())
    driver = control.Driver(library)
    driver.reset(library.with_name("libmfa_kernels_count.so"), mode="throw")
    ctypes.CDLL(str(device), mode=ctypes.RTLD_GLOBAL)
    torch._C._has_mps = True
    assert torch.backends.mps.is_available()
    return driver


DRIVER = install()


@pytest.fixture(autouse=True)
def no_driver_findings() -> Iterator[None]:
    DRIVER.library.mfa_driver_clear_findings()
    yield
    assert DRIVER.findings() == []
