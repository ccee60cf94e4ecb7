"""F.scaled_dot_product_attention and torch's varlen_attn by mfa: a provider for torch's registry of flash attentions.

    mfa.sdpa.enable()              or torch.nn.attention.activate_flash_attention_impl("MFA")
    with mfa.sdpa.enabled(): ...

Importing this registers the provider and activates nothing. Activation puts kernels for aten's ops under the keys of
MPS and, for the simulator, of CPU; what they don't take goes back to ATen, with the reason logged once. Code that
torch.compile has compiled keeps the attention that was active then. torch.vmap, and torch.func's grad, vjp and jacrev
are routed.

Where ATen's own kernel is faster, by policy.json, the call stays with ATen too; `enable(prefer="mfa")` takes it.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.attention as torch_attention
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import _log, _simulation, _torch, device
from .._arguments import Dense
from .._checks.dense import checked, is_plain
from .._ops import sharding
from ..attention import attention
from . import nested, policy, varlen

NAME = "MFA"
Preference = Literal["faster", "mfa"]

_aten = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Options:
    """How calls are routed."""

    cpu: bool = False  # CPU tensors too; without it they are taken inside mfa.simulate() only
    min_query_length: int = 0  # a shorter query stays with ATen
    repeat_heads: bool = False  # grouped heads also where enable_gqa isn't given
    prefer: Preference = "faster"  # what takes a call that both can

    def __post_init__(self) -> None:
        if self.prefer not in get_args(Preference):
            raise ValueError(f"prefer is {self.prefer!r}; it must be 'faster' or 'mfa'")


class Handle:
    """An activation: `remove()` ends it. The only one, since torch keeps one kernel for an op and a key."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        keys = ["MPS", "AutogradMPS"]
        if options.cpu or _simulation.why_not() is None:
            keys += ["CPU", "AutogradCPU"]
        route = functools.partial(_route, options)
        # Without the autograd keys the op would have no derivative; torch.func.grad's tensors on mps have the second.
        for key in (*keys, "AutogradOther"):
            self._library.impl("scaled_dot_product_attention", route, key)
        with warnings.catch_warnings():  # torch says that this replaces its own kernel, which decomposes the op
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._library.impl("scaled_dot_product_attention", route, "FuncTorchVmapMode")
        takes = functools.partial(_takes, options)
        for key in keys[::2]:  # these have derivatives of their own
            for name, kernel in varlen.kernels(takes).items():
                self._library.impl(name, kernel, key)
        for key in nested.KEYS:
            self._library.impl(nested.OP, nested.kernel(takes, _reasons_of_context), key)

    def remove(self) -> None:
        """Gives the ops back to ATen. Again: nothing."""
        global _active
        self._library = None  # torch unregisters when the last reference goes
        if _active is not self:
            return
        _active = None
        if _has_registry() and torch_attention.current_flash_attention_impl() == NAME:
            torch_attention.restore_flash_attention_impl()  # calls this once more, for nothing


_active: Handle | None = None
_next_options = Options()


def _activate() -> Handle:
    """What torch's registry calls."""
    global _active
    if _active is not None:
        _active.remove()
    _active = Handle(_next_options)
    return _active


def _has_registry() -> bool:
    """Whether torch can undo an activation (2.12 on). Without, the registry only gets to know the name."""
    return hasattr(torch_attention, "restore_flash_attention_impl")


def enable(*, cpu: bool = False, prefer: Preference = "faster") -> None:
    """Routes attention of `mps` tensors to mfa; of CPU tensors inside mfa.simulate(), or, with `cpu`, always.

    `prefer`: "faster" leaves a call to ATen where policy.json says that ATen is faster, and the log says so, once;
    "mfa" takes it all the same. Raises ValueError for another.
    """
    activate(Options(cpu=cpu, prefer=prefer))


def activate(options: Options) -> Handle:
    """`enable` with all options. Replaces another provider, or an earlier activation."""
    global _next_options
    _next_options = options
    try:
        if _has_registry():
            torch_attention.activate_flash_attention_impl(NAME)
        else:
            _activate()
    finally:
        _next_options = Options()
    assert _active is not None
    return _active


def disable() -> None:
    """Gives attention back to ATen. Without an activation: nothing."""
    if _active is not None:
        _active.remove()


def is_enabled() -> bool:
    """Whether an activation is in force."""
    return _active is not None


@contextmanager
def enabled(*, cpu: bool = False, prefer: Preference = "faster") -> Iterator[None]:
    """`enable` for a `with` block; afterwards whatever was active before is so again. Process-wide, like `enable`."""
    before = _active.options if _active is not None else None
    provider = torch_attention.current_flash_attention_impl() if _has_registry() else None
    enable(cpu=cpu, prefer=prefer)
    try:
        yield
    finally:
        if before is not None:
            activate(before)
        else:
            disable()
            if provider is not None and provider != NAME:
                torch_attention.activate_flash_attention_impl(provider)


def _takes(options: Options, tensor: Tensor) -> bool:
    """Whether tensors of this device are meant at all."""
    kind = tensor.device.type
    return kind == "mps" or (kind == "cpu" and (options.cpu or _simulation.active() is not None))


def _route(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`aten::scaled_dot_product_attention` while we are active."""
    grouped = enable_gqa
    if _takes(options, query):
        if options.repeat_heads and query.dim() > 2 and key.dim() > 2 and query.shape[-3] != key.shape[-3]:
            grouped = True
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, grouped)
        if (
            dropout_p == 0
            and not torch.compiler.is_compiling()
            and (attn_mask is None or not is_causal)
            and is_plain(query, key, value, attn_mask, grouped)
        ):  # as most calls are: a decoding step would feel the rest
            reasons = _reasons_of_place(query)
        else:
            reasons = not_supported_reasons(*arguments)
        if query.dim() > 1 and query.shape[-2] < options.min_query_length:
            reasons.append(f"query is shorter than {options.min_query_length}")
        if not reasons and options.prefer == "faster":
            reason = policy.reason_for_aten(query, key, value, attn_mask, dropout_p, is_causal)
            reasons += [] if reason is None else [reason]
        if not reasons:
            _log.LOG.debug("scaled_dot_product_attention by mfa: %s, keys %s", tuple(query.shape), tuple(key.shape))
            return attention(*arguments)
        for reason in reasons:
            _log.once(f"scaled_dot_product_attention goes to ATen: {reason}")
    if grouped and not enable_gqa:
        repeats = query.shape[-3] // max(1, key.shape[-3])
        key, value = (tensor.repeat_interleave(repeats, dim=-3) for tensor in (key, value))
    out: Tensor = _aten.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out


def not_supported_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[str]:
    """Why a call of F.scaled_dot_product_attention goes to ATen instead of mfa. Empty: it doesn't.

    Whether it is routed at all (see `enable`) isn't asked. Contexts count: `sdpa_kernel`, forward-mode differentiation.
    """
    reasons = _reasons_of_place(query)
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    for tensor in tensors:
        if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__") and not sharding.is_dtensor(tensor):
            reasons.append(f"mfa's ops don't support {type(tensor).__name__}")
            return reasons
    if attn_mask is not None and is_causal:
        reasons.append("attn_mask and is_causal are both given, which scaled_dot_product_attention refuses")
    try:
        scale = 1.0 if scale is None else scale
        checked(Dense(query, key, value, attn_mask, None, None, scale, dropout_p=dropout_p), enable_gqa)
    except (NotImplementedError, TypeError, ValueError) as error:
        reasons.append(str(error))
    return reasons


def _reasons_of_place(query: Tensor) -> list[str]:
    """Of the context, and of the device."""
    reasons = _reasons_of_context()
    if query.is_mps and (why_not := _mps_why_not()) is not None:
        reasons.append(why_not)
    return reasons


def _reasons_of_context() -> list[str]:
    reasons = []
    if not torch.backends.cuda.flash_sdp_enabled():
        reasons.append("sdpa_kernel leaves out SDPBackend.FLASH_ATTENTION")
    elif _another_has_priority():
        reasons.append("sdpa_kernel prefers another backend to SDPBackend.FLASH_ATTENTION")
    if _torch.has_dual_level():
        reasons.append("forward-mode differentiation is active, and mfa's ops don't support it")
    return reasons


def _another_has_priority() -> bool:
    """Whether sdpa_kernel(..., set_priority=True) put an enabled backend, in practice MATH, before flash attention."""
    order = _torch.sdp_priority_order()
    math, flash = (order.index(backend.value) for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION))
    return math < flash and torch.backends.cuda.math_sdp_enabled()


@functools.cache
def _mps_why_not() -> str | None:
    return device.device_info().why_not


if hasattr(torch_attention, "register_flash_attention_impl"):
    torch_attention.register_flash_attention_impl(NAME, register_fn=_activate)
