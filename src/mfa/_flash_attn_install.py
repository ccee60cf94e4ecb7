"""`import flash_attn` and flash_attn.bert_padding, for code that wants them where flash-attn isn't installed."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._log import LOG


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002 (as flash-attn calls it)
    """Rows of a tensor [T,...]."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of hidden_states [B,L,...] that attention_mask [B,L] has, and where they were.

    Tokens of `unused_mask` are packed as well, but don't count as used.

    Returns:
        tokens [T,...], their indices in [B*L], cu_seqlens int32 [B+1], the longest length, and used lengths int32 [B].
    """
    packed = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = packed.sum(-1, dtype=torch.int32)
    indices = packed.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What `unpad_input` packed, back in [B,L,...]; zeros elsewhere."""
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).view(batch, seqlen, *hidden_states.shape[1:])


_PADDING = (index_first_axis, pad_input, unpad_input)
_MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `flash_attn` here. It stands last, so that an installed flash-attn is found before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin="mfa", is_package=fullname == "flash_attn")

    def exec_module(self, module: ModuleType) -> None:
        from . import flash_attn

        if module.__name__ == "flash_attn.bert_padding":
            module.__dict__.update({function.__name__: function for function in _PADDING})
            return
        names = [name for name in flash_attn.__all__ if name.startswith("flash_attn_")]
        module.__dict__.update({name: getattr(flash_attn, name) for name in ("__version__", *names)})


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
