"""`import flash_attn` for code that wants it where flash-attn isn't installed."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from .._log import LOG
from . import bert_padding, flash_attn_interface

_MODULES = {
    "flash_attn": flash_attn_interface,
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `flash_attn` here. It stands last, so that an installed flash-attn is found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin="mfa", is_package=fullname == "flash_attn")

    def exec_module(self, module: ModuleType) -> None:
        ours = _MODULES[module.__name__]
        module.__dict__.update({name: getattr(ours, name) for name in ours.__all__})


_finder = _Finder()


def _is_ours(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and spec.loader is _finder


def install() -> bool:
    """Lets `import flash_attn` find `mfa.flash_attn`, and flash_attn.bert_padding, unless flash-attn is installed.

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
