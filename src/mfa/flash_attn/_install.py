"""`import flash_attn` for code that wants it where flash-attn isn't installed."""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any

from .._log import LOG
from . import bert_padding, cute, flash_attn_3, flash_attn_interface, rotary

_MODULES: dict[str, ModuleType | None] = {  # whose names each has; those in which others lie are packages
    "flash_attn": flash_attn_interface,
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": rotary,
    "flash_attn.ops": None,
    "flash_attn.ops.triton": None,
    "flash_attn.ops.triton.rotary": rotary,
    "flash_attn.cute": cute,
    "flash_attn.cute.interface": cute,
    "flash_attn_interface": flash_attn_3,
}
_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {flash_attn_interface.__version__}\n"
    "Summary: mfa.flash_attn under the name of flash-attn\n",
    "top_level.txt": "flash_attn\n",
    "INSTALLER": "mfa.flash_attn.install\n",
}


_EVERYTHING = importlib.metadata.DistributionFinder.Context()


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of flash-attn. Libraries ask for its version before they import it."""

    def read_text(self, filename: str) -> str | None:
        return _FILES.get(filename)

    def locate_file(self, path: Any) -> Any:
        return PurePosixPath(path)  # there are no files


class _Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """Finds `flash_attn` here. It stands last, so that an installed flash-attn is found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MODULES:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin="mfa", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        ours = _MODULES[module.__name__]
        if ours is not None:
            module.__dict__.update({name: getattr(ours, name) for name in ours.__all__})

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context = _EVERYTHING
    ) -> Iterable[importlib.metadata.Distribution]:
        wanted = context.name is None or re.sub("[-_.]+", "-", context.name).lower() == "flash-attn"
        return [_Distribution()] if wanted else []


_finder = _Finder()


def _is_ours(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.loader is _finder


def install() -> bool:
    """Lets `import flash_attn` find `mfa.flash_attn`, unless flash-attn is installed.

    So do its modules flash_attn_interface, bert_padding, layers.rotary, ops.triton.rotary and cute, FlashAttention-3's
    flash_attn_interface unless that is installed, and importlib.metadata, which tells libraries the version. Libraries
    that ask once, when they are imported, must be imported later.

    Returns:
        Whether it does. If not, flash-attn itself is there, and keeps being found; that is logged.
    """
    if _finder in sys.meta_path:
        return True
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        LOG.warning("flash_attn is installed: mfa.flash_attn.install() leaves it")
        return False
    sys.meta_path.append(_finder)
    return True


def uninstall() -> None:
    """Undoes `install`. Whoever has imported a function keeps it."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in filter(_is_ours, _MODULES):
        del sys.modules[name]
