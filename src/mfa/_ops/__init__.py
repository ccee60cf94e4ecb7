"""The ops, with all that torch asks of one: CPU kernel, fake, autograd, autocast, vmap, FLOPs and sharding.

Schemas and the kernels on MPS are in csrc/library.cpp. `mfa::attention` decomposes in attention.py.
"""

from . import append, decode, dense, paged, varlen
from .library import LIBRARY, ops

__all__ = ["LIBRARY", "append", "decode", "dense", "ops", "paged", "varlen"]
