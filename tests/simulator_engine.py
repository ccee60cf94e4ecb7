"""csrc/simulator/engine.h by ctypes: open a kernel library, dispatch a kernel, read the counters."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "simulator"))
import translate  # noqa: E402

RACES, BOUNDS, UNINITIALISED = 1, 2, 4
BUFFERS = 31
BUFFER, THREADGROUP, BUILTIN = range(3)


class Parameter(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("index", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_char_p),
        ("writable", ctypes.c_int),
        ("element_size", ctypes.c_size_t),
        ("is_reference", ctypes.c_int),
        ("function_constant", ctypes.c_char_p),
    ]


class Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("entry", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(Parameter)),
        ("parameter_count", ctypes.c_int),
        ("max_total_threads", ctypes.c_int),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
    ]


class FunctionConstant(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("index", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_char_p),
        ("is_set", ctypes.c_void_p),
    ]


class Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in [
            "mma",
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
            "device_reads",
            "device_writes",
            "threadgroup_reads",
            "threadgroup_writes",
            "conversions",
            "unit_mma",
        ]
    ]


class Argument(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("size", ctypes.c_uint64)]


class ConstantValue(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("value", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class DispatchInfo(ctypes.Structure):
    _fields_ = [
        ("library", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("constants", ctypes.POINTER(ConstantValue)),
        ("constant_count", ctypes.c_int),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads_per_threadgroup", ctypes.c_uint32 * 3),
        ("arguments", Argument * BUFFERS),
        ("threadgroup_memory", ctypes.c_uint64 * BUFFERS),
        ("checks", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("allow_divergence", ctypes.c_int),
    ]


class SimulationError(Exception):
    """What the engine found: kernel, rule, file:line, lanes."""


def engine_path() -> Path:
    """libmfa_simulator: MFA_SIMULATOR_LIBRARY, or the one in the installed package."""
    if override := os.environ.get("MFA_SIMULATOR_LIBRARY"):
        return Path(override)
    spec = importlib.util.find_spec("mfa")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        for suffix in ("so", "dylib"):
            if (path := Path(directory) / f"libmfa_simulator.{suffix}").exists():
                return path
    raise FileNotFoundError("no libmfa_simulator: install mfa or set MFA_SIMULATOR_LIBRARY")


@functools.cache
def engine() -> ctypes.CDLL:
    # Global, so that kernel libraries bind to this very copy wherever they were linked.
    library = ctypes.CDLL(str(engine_path().resolve()), mode=ctypes.RTLD_GLOBAL)
    library.mfa_sim_open.restype = ctypes.c_void_p
    library.mfa_sim_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.mfa_sim_kernel_at.restype = ctypes.POINTER(Kernel)
    library.mfa_sim_function_constant_at.restype = ctypes.POINTER(FunctionConstant)
    for name in ("kernel_at", "function_constant_at"):
        getattr(library, f"mfa_sim_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int]
    for name in ("kernel_count", "function_constant_count", "is_instrumented"):
        getattr(library, f"mfa_sim_{name}").argtypes = [ctypes.c_void_p]
    library.mfa_sim_dispatch.argtypes = [
        ctypes.POINTER(DispatchInfo),
        ctypes.POINTER(Counters),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return library


class Library:
    """A kernel library. Function constants may be given by index or by name."""

    def __init__(self, path: str | Path) -> None:
        error = ctypes.create_string_buffer(4096)
        self.handle = engine().mfa_sim_open(str(Path(path).resolve()).encode(), error, len(error))
        if not self.handle:
            raise SimulationError(error.value.decode())
        count = engine().mfa_sim_kernel_count(self.handle)
        kernels = [engine().mfa_sim_kernel_at(self.handle, i).contents for i in range(count)]
        self.kernels: dict[str, Kernel] = {kernel.name.decode(): kernel for kernel in kernels}
        count = engine().mfa_sim_function_constant_count(self.handle)
        constants = [engine().mfa_sim_function_constant_at(self.handle, i).contents for i in range(count)]
        self.constants: dict[str, FunctionConstant] = {constant.name.decode(): constant for constant in constants}
        self.instrumented = bool(engine().mfa_sim_is_instrumented(self.handle))
        self.threadgroup_memory_used = 0

    def dispatch(
        self,
        kernel: str,
        *,
        grid: Sequence[int],
        group: Sequence[int],
        arguments: Mapping[int, np.ndarray | bytes | None] | Sequence[np.ndarray | bytes | None] = (),
        constants: Mapping[str | int, bool | int | float | np.generic] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        checks: int = RACES | BOUNDS,
        seed: int = 0,
        allow_divergence: bool = False,
    ) -> dict[str, int]:
        """Runs it; the counters. Arrays are written in place; bytes are parameter blocks."""
        values = [self._constant(name, value) for name, value in (constants or {}).items()]
        keep: list[Any] = []
        info = DispatchInfo(library=self.handle, kernel=kernel.encode(), checks=checks, seed=seed)
        info.constants = (ConstantValue * max(1, len(values)))(
            *(ConstantValue(index, value.ctypes.data, value.nbytes) for index, value in values)
        )
        info.constant_count = len(values)
        info.allow_divergence = allow_divergence
        info.threadgroups[:] = [*grid, 1, 1][:3]
        info.threads_per_threadgroup[:] = [*group, 1, 1][:3]
        pairs = arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments)
        for index, argument in pairs:
            if argument is not None:
                array = np.frombuffer(bytearray(argument), np.uint8) if isinstance(argument, bytes) else argument
                keep.append(array)
                info.arguments[index] = Argument(array.ctypes.data, array.nbytes)
        for index, size in (threadgroup_memory or {}).items():
            info.threadgroup_memory[index] = size
        counters, used = Counters(), ctypes.c_uint64()
        error = ctypes.create_string_buffer(1 << 16)
        if engine().mfa_sim_dispatch(ctypes.byref(info), ctypes.byref(counters), ctypes.byref(used), error, len(error)):
            raise SimulationError(error.value.decode())
        self.threadgroup_memory_used = used.value
        return {name: getattr(counters, name) for name, _ in Counters._fields_}

    def _constant(self, name: str | int, value: Any) -> tuple[int, np.ndarray]:
        types = {"bool": np.bool_, "int": np.int32, "uint": np.uint32, "float": np.float32, "short": np.int16}
        by_index = {constant.index: constant for constant in self.constants.values()}
        constant = by_index[name] if isinstance(name, int) else self.constants[name]
        return constant.index, np.array([value], types[constant.type.decode()])


def build_kernels(sources: Sequence[str | Path], output: str | Path, *, mode: str = "count", **options: Any) -> Path:
    """translate.build_library() against the engine that the tests use."""
    return translate.build_library(sources, output, mode=mode, engine_library=engine_path(), **options)


def open_library(path: str | Path) -> Library:
    return Library(path)
