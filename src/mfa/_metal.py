"""The Metal backend in libmfa, through its C functions (csrc/metal/interface.h). A build without it lacks them."""

import ctypes
import functools
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import _library, _log
from ._native import Launch


@functools.cache
def _backend() -> ctypes.CDLL | None:
    library = ctypes.CDLL(str(_library.path_of("mfa")))
    if not hasattr(library, "mfa_metal_info"):
        return None
    for name in ("mfa_metal_info", "mfa_metal_precompile", "mfa_metal_clear_cache"):
        getattr(library, name).restype = ctypes.c_void_p  # a char* would become bytes, and could not be freed
    library.mfa_metal_free.argtypes = [ctypes.c_void_p]
    return library


def _text(call: Callable[..., int | None], *arguments: object) -> str | None:
    address = call(*arguments)
    if address is None:
        return None
    backend = _backend()
    assert backend is not None
    try:
        return ctypes.string_at(address).decode()
    finally:
        backend.mfa_metal_free(address)


def info() -> dict[str, Any] | None:
    """The GPU and what the backend found, see csrc/metal/interface.h; None if there is no backend in this build.

    Logs, once each, what is not as usual, and why.
    """
    backend = _backend()
    if backend is None:
        return None
    result: dict[str, Any] = json.loads(_text(backend.mfa_metal_info) or "{}")
    for note in result.get("notes", []):
        _log.once(note)
    return result


def precompile(launches: Iterable[Launch]) -> None:
    """Compiles the kernels of `launches`, several at a time. Raises RuntimeError."""
    with ThreadPoolExecutor() as pool:
        for failure in pool.map(_precompile, launches):
            if failure is not None:
                raise RuntimeError(failure)


def _precompile(launch: Launch) -> str | None:
    backend = _backend()
    assert backend is not None
    names = [name.encode() for name in launch.constants]
    values = bytes(launch.constants.values())
    return _text(
        backend.mfa_metal_precompile,
        launch.kernel.encode(),
        (ctypes.c_char_p * len(names))(*names),
        (ctypes.c_ubyte * len(values))(*values),
        ctypes.c_int(len(names)),
    )


def clear_cache() -> None:
    """Forgets the compiled pipelines, in memory and on disk. Raises RuntimeError."""
    backend = _backend()
    if backend is not None and (failure := _text(backend.mfa_metal_clear_cache)) is not None:
        raise RuntimeError(failure)
