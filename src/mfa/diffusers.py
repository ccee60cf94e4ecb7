"""mfa in Hugging Face diffusers.

    mfa.diffusers.enable(pipeline)        # or one of its models; disable() undoes it

An attention layer keeps its processor, whatever that is, but the F.scaled_dot_product_attention that it calls is
`mfa.attention`. So does a block that calls it by itself (autoencoders have such). Nothing in diffusers or torch is
replaced: other models keep their attention.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import _log
from .attention import attention


def enable(model: Any) -> int:
    """Lets the attention layers of a diffusers pipeline, or of a model, compute with mfa.

    A pipeline's models are its denoiser, autoencoder and controlnets, and its text encoders: those are of transformers,
    and get `attn_implementation="mfa"`. What mfa.attention doesn't take goes to PyTorch's as before, with the reason
    logged once. Processors may be changed before or afterwards (IP adapters, `fuse_qkv_projections`); one that doesn't
    call F.scaled_dot_product_attention keeps its own attention, which is logged too.

    Args:
        model: a `DiffusionPipeline`, or a module.

    Returns:
        How many attention layers compute with mfa now; a text encoder counts as one.

    Raises:
        TypeError: neither a pipeline nor a module. ValueError: there is no attention layer in it.
    """
    count = 0
    for module in _modules(model):
        if hasattr(module, "set_attn_implementation"):
            count += _enable_text_encoder(module)
        for layer in _layers(module):
            if not isinstance(layer, _Enabled):
                layer.__class__ = _enabled(layer.__class__)
            count += 1
        _log_others(module)
    if count == 0:
        raise ValueError(f"model is a {type(model).__name__} without attention layers; it must have some")
    return count


def disable(model: Any) -> None:
    """Undoes `enable`. What isn't enabled stays as it is."""
    for module in _modules(model):
        if hasattr(module, "_mfa_replaced"):
            module.set_attn_implementation(module._mfa_replaced)
            del module._mfa_replaced
        for layer in _layers(module):
            if isinstance(layer, _Enabled):
                layer.__class__ = type(layer).__bases__[1]


def _modules(model: Any) -> Iterator[Any]:
    if isinstance(model, torch.nn.Module):
        yield model
    elif isinstance(getattr(model, "components", None), dict):
        yield from (part for part in model.components.values() if isinstance(part, torch.nn.Module))
    else:
        raise TypeError(f"model is of type {type(model).__name__}; it must be a diffusers pipeline or a module")


def _layers(module: Any) -> list[Any]:
    """Attention layers as diffusers itself recognises them, and what calls F.scaled_dot_product_attention without."""
    processors = {id(getattr(layer, "processor", None)) for layer in module.modules()}
    return [
        layer
        for layer in module.modules()
        if _has_processor(layer) or (_calls_sdpa(layer.__class__) and id(layer) not in processors)
    ]


def _has_processor(layer: Any) -> bool:
    processor = getattr(layer, "processor", None)
    return processor is not None and (hasattr(layer, "set_processor") or _calls_sdpa(processor.__class__))


@functools.cache
def _calls_sdpa(kind: Any) -> bool:
    """Whether a method of the class names the function."""
    methods = (method for base in kind.__mro__ for method in vars(base).values() if inspect.isfunction(method))
    return any("scaled_dot_product_attention" in method.__code__.co_names for method in methods)


def _log_others(module: torch.nn.Module) -> None:
    """What is called attention, and neither is a layer of ours nor has to do with one."""
    if hasattr(module, "set_attn_implementation"):  # of transformers: logged above
        return
    parts = {id(part) for layer in _layers(module) for part in layer.modules()}
    for other in module.modules():
        name = type(other).__name__
        is_called_so = "Attention" in name or "Attn" in name
        if is_called_so and parts.isdisjoint(map(id, other.modules())):
            _log.once(f"{name} keeps its attention: it doesn't call F.scaled_dot_product_attention")


def _enable_text_encoder(module: Any) -> int:
    from . import transformers

    transformers.register()
    if not module._can_set_attn_implementation():
        _log.once(f"{type(module).__name__} keeps its attention: it doesn't use transformers' attention interface")
        return 0
    if not hasattr(module, "_mfa_replaced"):
        module._mfa_replaced = module.config._attn_implementation
        module.set_attn_implementation("mfa")
    return 1


class _Enabled:
    """Before the class of an attention layer: what the layer calls goes through `_Route`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = _Route()
        with route:
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not route.used:
            name = type(getattr(self, "processor", self)).__name__
            _log.once(f"{name} keeps its attention: it doesn't call F.scaled_dot_product_attention")
        return result


@functools.cache
def _enabled(kind: Any) -> Any:
    return type(kind.__name__, (_Enabled, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Route(TorchFunctionMode):
    """Within it, F.scaled_dot_product_attention is mfa.attention."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.used = True
            return _sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    try:
        return attention(*arguments)
    except (NotImplementedError, TypeError, ValueError) as error:
        _log.once(f"scaled_dot_product_attention goes to ATen: {error}")
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
