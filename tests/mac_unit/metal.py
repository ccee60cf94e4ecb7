"""Metal through Objective-C's runtime, as far as probes need it: on a Mac, or over the software driver.

Not through torch: a probe wants the GPU's own clock, a pipeline's limits, and kernels that mfa doesn't ship.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_double, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfa import _library

BOOL = 53  # MTLDataType


class Size(ctypes.Structure):
    _fields_ = [("width", c_uint64), ("height", c_uint64), ("depth", c_uint64)]


class MetalError(Exception):
    """What Metal refused, and why."""


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Objective-C's runtime and Metal."""
    if sys.platform != "darwin":
        driver = ctypes.CDLL(str(_library.path_of("mfa_driver")))
        return driver, driver
    frameworks = Path("/System/Library/Frameworks")
    for name in ("CoreGraphics", "Metal"):  # without the first there is no default device
        metal = ctypes.CDLL(str(frameworks / f"{name}.framework" / name))
    return ctypes.CDLL("/usr/lib/libobjc.dylib"), metal


def _call(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    prototype = ctypes.CFUNCTYPE(result, *(type(argument) for argument in arguments))
    return prototype((name, library))(*arguments)


def send(receiver: int | None, selector: str, *arguments: Any, result: Any = c_void_p) -> Any:
    """A message. Arguments are of ctypes."""
    runtime = _libraries()[0]
    name = _call(runtime, "sel_registerName", c_void_p, c_char_p(selector.encode()))
    return _call(runtime, "objc_msgSend", result, c_void_p(receiver), c_void_p(name), *arguments)


def _class(name: str) -> int:
    return int(_call(_libraries()[0], "objc_getClass", c_void_p, c_char_p(name.encode())))


@contextmanager
def _pool() -> Iterator[None]:
    """Releases what Metal returns autoreleased."""
    runtime = _libraries()[0]
    pool = _call(runtime, "objc_autoreleasePoolPush", c_void_p)
    try:
        yield
    finally:
        _call(runtime, "objc_autoreleasePoolPop", None, c_void_p(pool))


def _text(string: int) -> c_void_p:
    return c_void_p(send(_class("NSString"), "stringWithCString:encoding:", c_char_p(string), c_uint64(4)))


def _said(error: int | None) -> str:
    text = send(send(error, "localizedDescription"), "UTF8String", result=c_char_p) if error else None
    return text.decode() if text else "no reason given"


class _Owned:
    """An object that Metal gave to us."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        send(self.handle, "release", result=None)


def _made(receiver: int, selector: str, *arguments: Any) -> int:
    """What a method with a last argument `error` makes. Raises MetalError."""
    error = c_void_p()
    handle = send(receiver, selector, *arguments, ctypes.pointer(error))
    if not handle:
        raise MetalError(f"{selector} {_said(error.value)}")
    return int(handle)


class Buffer(_Owned):
    """Shared memory, that starts as a copy of an array."""

    def __init__(self, device: int, content: np.ndarray) -> None:
        content = np.ascontiguousarray(content)
        super().__init__(
            send(
                device,
                "newBufferWithBytes:length:options:",
                c_void_p(content.ctypes.data),
                c_uint64(content.nbytes),
                c_uint64(0),
            )
        )
        self._like = content.dtype, content.shape

    def read(self) -> np.ndarray:
        """A copy."""
        dtype, shape = self._like
        memory = (ctypes.c_ubyte * (dtype.itemsize * int(np.prod(shape)))).from_address(send(self.handle, "contents"))
        return np.frombuffer(memory, dtype).reshape(shape).copy()


class Pipeline(_Owned):
    @property
    def most_threads(self) -> int:
        """That a threadgroup may have: by the registers that it takes, if the kernel doesn't say."""
        return int(send(self.handle, "maxTotalThreadsPerThreadgroup", result=c_uint64))


class Launch(NamedTuple):
    pipeline: Pipeline
    grid: tuple[int, int, int]  # threadgroups
    group: tuple[int, int, int]  # threads of one
    arguments: Mapping[int, Buffer | bytes]  # bytes: a block of parameters


class Library(_Owned):
    def __init__(self, device: int, path: Path) -> None:
        with _pool():
            url = send(_class("NSURL"), "fileURLWithPath:", _text(str(path).encode()))
            super().__init__(_made(device, "newLibraryWithURL:error:", c_void_p(url)))
        self._device = device

    def names(self) -> list[str]:
        """Of its kernels."""
        with _pool():
            array = send(self.handle, "functionNames")
            count = send(array, "count", result=c_uint64)
            strings = [send(array, "objectAtIndex:", c_uint64(i)) for i in range(count)]
            return sorted(send(string, "UTF8String", result=c_char_p).decode() for string in strings)

    def pipeline(self, kernel: str, constants: Mapping[int, bool] | None = None) -> Pipeline:
        """With these function constants, by index; a library that has any wants them all. Raises MetalError."""
        values = _Owned(send(send(_class("MTLFunctionConstantValues"), "alloc"), "init"))
        for index, value in (constants or {}).items():
            place = ctypes.pointer(c_bool(value))
            send(values.handle, "setConstantValue:type:atIndex:", place, c_uint64(BOOL), c_uint64(index), result=None)
        with _pool():
            selector = "newFunctionWithName:constantValues:error:"
            function = _Owned(_made(self.handle, selector, _text(kernel.encode()), c_void_p(values.handle)))
            selector = "newComputePipelineStateWithFunction:error:"
            return Pipeline(_made(self._device, selector, c_void_p(function.handle)))


class Device:
    """The system's default GPU."""

    def __init__(self) -> None:
        self.handle = _call(_libraries()[1], "MTLCreateSystemDefaultDevice", c_void_p)
        if not self.handle:
            raise MetalError("this machine has no GPU that Metal can use")
        self._queue = _Owned(send(self.handle, "newCommandQueue"))

    def library(self, path: Path) -> Library:
        return Library(self.handle, path)

    def buffer(self, content: np.ndarray) -> Buffer:
        return Buffer(self.handle, content)

    def run(self, launch: Launch, times: int = 1) -> float:
        """So many, one after another. Seconds that they took the GPU. Raises MetalError."""
        with _pool():
            commands = send(self._queue.handle, "commandBuffer")
            encoder = send(commands, "computeCommandEncoder")
            send(encoder, "setComputePipelineState:", c_void_p(launch.pipeline.handle), result=None)
            for index, argument in launch.arguments.items():
                if isinstance(argument, bytes):
                    content = c_char_p(argument), c_uint64(len(argument))
                    send(encoder, "setBytes:length:atIndex:", *content, c_uint64(index), result=None)
                else:
                    content = c_void_p(argument.handle), c_uint64(0)
                    send(encoder, "setBuffer:offset:atIndex:", *content, c_uint64(index), result=None)
            for _ in range(times):
                sizes = Size(*launch.grid), Size(*launch.group)
                send(encoder, "dispatchThreadgroups:threadsPerThreadgroup:", *sizes, result=None)
            send(encoder, "endEncoding", result=None)
            send(commands, "commit", result=None)
            send(commands, "waitUntilCompleted", result=None)
            if error := send(commands, "error"):
                raise MetalError(_said(error))
            return elapsed(commands)


def elapsed(commands: int) -> float:
    """Seconds, by the GPU's clock; the software driver has none, and says 0."""
    start, end = (send(commands, f"GPU{name}Time", result=c_double) for name in ("Start", "End"))
    return float(end - start)
