"""`attn_implementation="mfa"` in Hugging Face transformers 5.

    mfa.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mfa")

transformers asks two functions: `mask`, once per forward pass, which keys a query may see, and `attention`, in each
layer, for the result. Ours say what may be seen as a window and a row of keys, as long as that is all there is to say:
causal, sliding and padded attention then need no L x L matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers import masking_utils as hf

from . import _torch
from .attention import attention as mfa_attention
from .varlen import attention_varlen

_Window = tuple[int | None, int | None]

# Arguments that change the result, of which nothing here knows how.
_UNSUPPORTED = ("indices", "block_indices", "sinks", "block_table", "k_cache", "output_attentions", "head_mask")
_SPECIAL = ("flash", "sdpa", "flex_attention", "eager")  # transformers treats names with these words as its own


def register(name: str = "mfa") -> None:
    """Makes `attn_implementation=name` work in every model whose attention goes through transformers' interface.

    That is: in `from_pretrained`, in configurations, and in `model.set_attn_implementation`. Again: nothing changes.

    Raises:
        ValueError: a name that means something else to transformers.
    """
    if not name.isidentifier() or any(word in name for word in _SPECIAL):
        raise ValueError(f"name is {name!r}; it must be an identifier without {', '.join(map(repr, _SPECIAL))}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


class Mask(Tensor):
    """A bool mask [B,1,Lq,Lk], True = attend, that is kept as a window and a row of keys.

    `attention` takes those. For everybody else it is a tensor: whatever is done to it is done to the matrix itself.
    """

    window: _Window  # relative to the lower right
    keys: Tensor | None  # bool [B,1,1,Lk]
    _matrix: Tensor | None

    @classmethod
    def of(cls, size: Sequence[int], device: torch.device | str, window: _Window, keys: Tensor | None) -> "Mask":
        # Should its own elements ever be seen, then they hide everything, and no model gives sense.
        made: Mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device).expand(*size).as_subclass(cls)
        made.window, made.keys, made._matrix = window, keys, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with _torch.plain_functions():
            if func not in _ABOUT:
                args, kwargs = _torch.tree_map_only(Mask, Mask.matrix, (args, kwargs))
            return func(*args, **(kwargs or {}))

    def matrix(self) -> Tensor:
        """The mask itself, made when it is first needed."""
        if self._matrix is None:
            batch, _, length_q, length_k = self.shape
            diagonal = torch.arange(length_q, device=self.device)[:, None] + (length_k - length_q)
            key = torch.arange(length_k, device=self.device)
            seen = torch.ones((1, 1, length_q, length_k), dtype=torch.bool, device=self.device)
            left, right = self.window
            if left is not None:
                seen = seen & (key >= diagonal - left)
            if right is not None:
                seen = seen & (key <= diagonal + right)
            if self.keys is not None:
                seen = seen & self.keys
            self._matrix = seen.expand(batch, -1, -1, -1)
        return self._matrix


_ABOUT = {  # what is asked about a mask, not done to it
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_nested", "layout")),
    *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.storage_offset),
}


def mask(**terms: Any) -> Tensor | None:
    """transformers' mask interface: what each query may see, or None where `attention` knows by itself.

    Args:
        terms: those of `transformers.masking_utils.sdpa_mask`, and the model's config.

    Raises:
        NotImplementedError: the model computes attention by itself and would misread the mask.
    """
    _check_model(terms.get("config"))
    is_tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if terms.get("q_length", 1) > 1 and not is_tracing:
        reach = _reach(terms.get("mask_function", hf.causal_mask_function))
        if reach is not None:
            return _lazy_mask(reach, **terms)
    if getattr(terms.get("config"), "num_kv_shared_layers", 0):  # Gemma 4 may drop queries, and then needs the mask
        terms["allow_is_causal_skip"] = False
    dense: Tensor | None = hf.sdpa_mask(**terms)
    return dense


def _lazy_mask(
    reach: _Window,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> "Mask | None":
    """Window and keys of a mask of which `_reach` knows the function."""
    # Positions are absolute, windows relative to the lower right.
    shift = int(q_offset) - kv_offset - (kv_length - q_length)
    left, right = reach
    left = left if left is None else left - shift
    right = right if right is None else right + shift
    # From such bounds on they hide nothing.
    left = None if left is not None and left >= kv_length - 1 else left
    right = None if right is not None and right >= q_length - 1 else right
    keys = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        visible = keys if right is None else keys[:, : max(0, kv_length + right)]
        keys = None if visible.all() else keys[:, None, None]
    if (left, right, keys) == (None, None, None) and allow_is_bidirectional_skip:
        return None
    return Mask.of((batch_size, 1, q_length, kv_length), device, (left, right), keys)


# A mask function is a closure; those with the same code say the same. The last is not in transformers 5.0.
_AND = hf.and_masks().__code__
_OVERLAYS: dict[Any, Callable[[int], _Window]] = {
    getattr(hf, name)(1).__code__: reach
    for name, reach in (
        ("sliding_window_overlay", lambda size: (size - 1, None)),
        ("sliding_window_bidirectional_overlay", lambda size: (size, size)),
    )
    if hasattr(hf, name)
}


def _reach(function: Callable[..., Any]) -> _Window | None:
    """How far (back, ahead) of its own position a query sees; None if `function` says anything else."""
    if function is hf.causal_mask_function:
        return None, 0
    if function is hf.bidirectional_mask_function:
        return None, None
    code = getattr(function, "__code__", None)
    if code is not _AND and code not in _OVERLAYS:
        return None
    (variable,) = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    if code in _OVERLAYS:
        return _OVERLAYS[code](variable)
    back, ahead = None, None
    for part in variable:
        reach = _reach(part)
        if reach is None:
            return None
        back, ahead = _least(back, reach[0]), _least(ahead, reach[1])
    return back, ahead


def _least(a: int | None, b: int | None) -> int | None:
    return min((bound for bound in (a, b) if bound is not None), default=None)


_checked: set[type] = set()


def _check_model(config: Any) -> None:
    """Refuses models that don't ask the attention interface: they'd add a bool mask to their scores."""
    if config is None or type(config) in _checked or torch.compiler.is_compiling():
        return
    model: Any = AutoModel._model_mapping.get(type(config), None)
    if isinstance(model, type) and not model._can_set_attn_implementation():  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"attn_implementation={config._attn_implementation!r} is not supported by {model.__name__}, which doesn't "
            "use transformers' attention interface: use 'eager'"
        )
    _checked.add(type(config))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, on `mfa.attention`.

    Args:
        module: the layer; says whether it is causal where `is_causal` is None.
        query: [B,Hq,Lq,D]; key: [B,Hkv,Lk,D]; value: [B,Hkv,Lk,Dv].
        attention_mask: from `mask`, or bool (True = attend) or float (added), broadcasting to [B,Hq,Lq,Lk]. None: a
            causal layer is aligned to the upper left, unless there is a single query, which sees all.
        sliding_window: a query sees this many keys, itself among them. A mask says that too, and more precisely.
        softcap, s_aux: `softcap` and `sinks` of mfa.attention.
        position_bias: [1 or B,Hq,Lq,Lk], added to the scaled scores (T5).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: several sequences are packed in one row. They say what
            may be seen, unless the mask has padding; a mask made from position_ids repeats it.
        others: what transformers passes along for other implementations.

    Returns:
        out [B,Lq,Hq,Dv], contiguous, and None for the probabilities, which nobody has computed.

    Raises:
        NotImplementedError: an argument that changes the result and isn't supported.
    """
    for name in _UNSUPPORTED:
        given = others.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"{name} is not supported; use attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if s_aux is not None and s_aux.dtype != query.dtype:
        s_aux = s_aux.float()
    terms: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "dropout_p": dropout}
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and not _has_padding(attention_mask):
        if position_bias is not None:
            raise NotImplementedError("position_bias is not supported with cu_seq_lens_q; pad instead of packing")
        longest = (int(query.shape[2] if length is None else length) for length in (max_length_q, max_length_k))
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        starts = [tensor.to(torch.int32) for tensor in (cu_seq_lens_q, cu_seq_lens_k)]
        back = None if sliding_window is None else sliding_window - 1
        window = (back, 0 if causal else back)
        out = attention_varlen(*flat, *starts, *longest, window=window, **terms)  # type: ignore[call-overload]
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None

    window, bias = (None, None), attention_mask
    if isinstance(attention_mask, Mask):
        window, bias = attention_mask.window, attention_mask.keys
    elif attention_mask is None and causal and query.shape[2] > 1:
        diagonal = query.shape[2] - key.shape[2]  # 0 in the upper left
        window = (None if sliding_window is None else sliding_window - 1 - diagonal, diagonal)
    if position_bias is not None:
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = torch.where(bias, position_bias, -torch.inf)
        else:
            bias = position_bias + bias
    if bias is not None and bias.dtype not in (torch.bool, torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    out = mfa_attention(query, key, value, bias, enable_gqa=grouped, window=window, **terms)
    return out.transpose(1, 2).contiguous(), None


def _has_padding(attention_mask: Tensor | None) -> bool:
    return isinstance(attention_mask, Mask) and attention_mask.keys is not None
