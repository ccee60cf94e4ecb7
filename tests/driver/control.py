"""The driver's C ABI (csrc/simulator/driver/control.h) for tests."""

import ctypes
from pathlib import Path

MODES = {"record": 0, "throw": 1, "abort": 2}
EXECUTIONS = {"eager": 0, "lazy": 1, "nothing": 2}
CHECKS = 7  # races, bounds, uninitialised


class Driver:
    """A loaded driver. One per process: its state is the library's."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.mfa_driver_live_count.restype = ctypes.c_uint64
        self.library.mfa_driver_message_count.restype = ctypes.c_uint64

    def reset(self, kernels: Path, execution: str = "eager", mode: str = "record") -> None:
        self.library.mfa_driver_set_mode(MODES[mode])
        self.library.mfa_driver_set_execution(EXECUTIONS[execution])
        self.library.mfa_driver_set_kernel_library(str(kernels).encode())
        self.library.mfa_driver_set_device(1, 7, 15, 0)
        self.library.mfa_driver_set_checks(CHECKS, ctypes.c_uint64(0))
        self.library.mfa_driver_clear_findings()

    def text(self, name: str) -> list[str]:
        function = getattr(self.library, f"mfa_driver_{name}")
        function.restype = ctypes.c_void_p
        address = ctypes.c_void_p(function())
        lines = ctypes.string_at(address).decode().splitlines()
        self.library.mfa_driver_free(address)
        return lines

    def findings(self) -> list[str]:
        return self.text("findings")

    def live(self) -> list[str]:
        return self.text("live_objects")
