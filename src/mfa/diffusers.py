"""mfa in Hugging Face diffusers.

    mfa.diffusers.enable(pipeline)        # or one of its models; disable() undoes it

Each attention processor of a model keeps doing what it does, whatever its kind; but the F.scaled_dot_product_attention
that it calls is `mfa.attention`. Nothing in diffusers or torch is replaced: other models keep their attention.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import attention

LOG = logging.getLogger("mfa")

_logged: set[str] = set()


def enable(model: Any) -> int:
    """Lets the attention of a diffusers pipeline, or of a model, run on mfa.

    Of a pipeline, all models: denoiser, autoencoder, controlnets, and text encoders, which are of transformers and get
    `attn_implementation="mfa"`. What mfa.attention doesn't take goes to PyTorch's as before, with the reason logged
    once. A processor that is set later (`set_attn_processor`, IP adapters, `fuse_qkv_projections`) needs `enable` again.

    Args:
        model: a `DiffusionPipeline`, or a module with attention processors.

    Returns:
        How many attention layers there are, each enabled now. Again: the same.

    Raises:
        TypeError: neither a pipeline nor a module. ValueError: there is no attention processor in it.
    """
    count = 0
    for module in _modules(model):
        if hasattr(module, "set_attn_implementation"):
            count += _enable_transformers(module)
        for processor in _processors(module):
            kind = type(processor)
            if not issubclass(kind, _Enabled):
                processor.__class__ = _enabled(kind)
            count += 1
    if count == 0:
        raise ValueError(f"model is a {type(model).__name__} without attention processors; it must have some")
    return count
