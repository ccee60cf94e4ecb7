"""flash-attn 2.8 on top of mfa: its functions, signatures and conventions.

    from mfa.flash_attn import flash_attn_func        # instead of: from flash_attn import flash_attn_func

    mfa.flash_attn.install()                          # or: for code that imports flash_attn, where there is no other

Layout [B,L,H,D]. Causal and windows are aligned to the lower right, -1 is open. What flash-attn has and this hasn't
raises NotImplementedError. This has, beyond it, float32, any D up to 512, Dv other than D, gradients through the lse,
and results that are always deterministic. The lse of a row that sees no key is -inf, where flash-attn has inf.

Its modules: `flash_attn_interface`, which also has the functions below autograd that other libraries import;
`bert_padding`; `rotary`: flash_attn.layers.rotary; `flash_attn_3`: FlashAttention-3's flash_attn_interface; `cute`:
FlashAttention-4's flash_attn.cute.
"""

from ._install import install, uninstall
from .flash_attn_interface import (
    __version__,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
