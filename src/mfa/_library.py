"""The compiled parts: where they lie, and loading the ops."""

import ctypes
import sys
from pathlib import Path

import torch

OPS = (
    "attention",
    "attention_forward",
    "attention_forward_with_correction",
    "attention_backward",
    "attention_varlen_forward",
    "attention_varlen_forward_with_correction",
    "attention_varlen_backward",
    "attention_append",
    "attention_decode",
    "attention_varlen_paged",
)
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def _native_directory() -> Path:
    """The directory of the compiled files: the package's own, or that of an editable installation."""
    try:
        from . import _native
    except ImportError as error:
        raise ImportError(
            f"the compiled part of mfa can't be imported ({error}); run `make build`, or reinstall torch-mfa"
        ) from error
    return Path(_native.__file__).resolve().parent


def path_of(library: str) -> Path:
    """The absolute path of a shared library of the package, by the name of its target; it may not exist."""
    return _native_directory() / f"lib{library}{_SUFFIX}"


def metallib() -> Path:
    """The absolute path of the compiled Metal kernels; the file may not exist."""
    return _native_directory() / "mfa.metallib"


def load() -> None:
    """Loads libmfa, which registers the ops. By absolute path, because a second copy would register them twice."""
    library = path_of("mfa")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} can't be loaded ({error}); torch is {torch.__version__}") from error
    # A schema that torch refuses is only a missing op: registration doesn't report errors.
    missing = [name for name in OPS if not hasattr(torch.ops.mfa, name)]
    if missing:
        raise ImportError(f"{library} does not register mfa::{missing[0]}; torch is {torch.__version__}")


def address_of(symbol: str) -> int:
    """The address of a C function of libmfa."""
    function = getattr(ctypes.CDLL(str(path_of("mfa"))), symbol)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def prefer_instance(name: str | None) -> None:
    """Runs this kernel instance (a name of `_native.catalogue()`) wherever it can run, whatever tuning.def says.

    None forgets all that were preferred. Not while ops run. Raises ValueError for a name that isn't there.
    """
    if not ctypes.CDLL(str(path_of("mfa"))).mfa_prefer_instance(None if name is None else name.encode()):
        raise ValueError(f"name is {name!r}; it must be that of a kernel instance, see metal/instances.def")


def set_backward_mode(gemms: int) -> int:
    """How many products the kernels' backward pass makes: 5, 7, or 0 for tuning.def's choice. Returns what it was."""
    return int(ctypes.CDLL(str(path_of("mfa"))).mfa_set_backward_mode(gemms))
