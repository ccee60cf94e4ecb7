"""`attn_implementation="mfa"` in Hugging Face transformers 5.

    mfa.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mfa")

transformers asks two functions: `mask`, once per forward pass, which keys a query may see, and `attention`, in each
layer, for the result. Ours say what may be seen as a window, a row of keys and sequences in a row, as long as that is
all there is to say: causal, sliding, padded and packed attention then need no L x L matrix. A long mask that says more
(chunks, images whose tokens see each other) is a block mask.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from .. import _log
from ..attention import attention as mfa_attention
from ..varlen import attention_varlen
from ._mask import Mask, mask
from ._models import is_eager_only, watch
from ._serving import accept, attend_over_pages

__all__ = ["Mask", "attention", "mask", "register"]

# Arguments that change the result, of which nothing here knows how.
_UNSUPPORTED = ("sinks", "head_mask")
_SPECIAL = ("flash", "sdpa", "flex_attention", "eager")  # transformers treats names with these words as its own


def register(name: str = "mfa") -> None:
    """Makes `attn_implementation=name` work in every model whose attention goes through transformers' interface.

    That is: in `from_pretrained`, in configurations, and in `model.set_attn_implementation`. Where a model has other
    attention, the log says so, once. Again: nothing changes.

    Raises:
        ValueError: a name that means something else to transformers.
    """
    if not name.isidentifier() or any(word in name for word in _SPECIAL):
        raise ValueError(f"name is {name!r}; it must be an identifier without {', '.join(map(repr, _SPECIAL))}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    watch(name)
    accept(name)


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
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = None,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, on `mfa.attention`.

    Args:
        module: the layer; says whether it is causal where `is_causal` is None.
        query: [B,Hq,Lq,D]; key: [B,Hkv,Lk,D]; value: [B,Hkv,Lk,Dv].
        attention_mask: from `mask`, or bool (True = attend) or float (added), broadcasting to [B,Hq,Lq,Lk]. None: a
            causal layer is aligned to the upper left, unless there is a single query, which sees all; layers of a model
            that knows eager attention only see all.
        sliding_window: a query sees this many keys, itself among them. A mask says that too, and more precisely.
        softcap, s_aux: `softcap` and `sinks` of mfa.attention.
        position_bias: [1 or B,Hq,Lq,Lk], added to the scaled scores (T5).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: several sequences are packed in one row. A mask counts
            as well. With padding, or made while torch.compile traces, it makes that cost a matrix [B,1,Lq,Lk].
        indices: integers [B,Lq,n], keys that a query may see (DeepSeek's sparse attention), negative for none.
        block_indices: the same [B,Hi,Lq,n] for Hq/Hi heads each, in blocks of `module.indexer.block_size` keys.
        output_attentions: nothing comes of it, as with transformers' sdpa.
        block_table, k_cache, v_cache: of continuous batching: int32 [Lq,pages per request], [pages,page,Hkv,D] and the
            same with Dv. Each query is the newest token of a request, and its key and value are appended first.
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
    if output_attentions:
        _log.once("output_attentions: attention has none to give; use attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    back = None if sliding_window is None else sliding_window - 1
    if s_aux is not None and s_aux.dtype != query.dtype:
        s_aux = s_aux.float()
    terms: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "dropout_p": dropout}
    known = attention_mask if isinstance(attention_mask, Mask) else None
    seen = _chosen(module, query, key, indices, block_indices)
    starts = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (cu_seq_lens_q, cu_seq_lens_k)

    if block_table is not None or k_cache is not None or v_cache is not None:
        pages: Any = {
            "block_table": block_table,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "cu_seq_lens_k": cu_seq_lens_k,
        }
        for name, given in pages.items():
            if given is None:
                raise NotImplementedError(f"{name} is None; {', '.join(pages)} are only supported together")
        del terms["dropout_p"]  # of inference
        return attend_over_pages(query, key, value, **pages, window=(back, None), **terms), None

    is_packed = starts is not None or (known is not None and known.sequences is not None)
    if is_packed and seen is None and position_bias is None and _is_window(attention_mask, query, key):
        window = (back, 0 if causal else back) if known is None else known.window
        if known is not None and (known.sequences is not None or query.shape[0] > 1):
            starts = (known.starts(cu_seq_lens_q),) * 2
        assert starts is not None
        longest = (int(query.shape[2] if length is None else length) for length in (max_length_q, max_length_k))
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        cu_seqlens = [tensor.to(torch.int32) for tensor in starts]
        out = attention_varlen(*flat, *cu_seqlens, *longest, window=window, **terms)  # type: ignore[call-overload]
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None

    window, bias, blocks = (None, None), attention_mask, None
    if known is not None and known.blocks is not None:
        is_all = seen is None and starts is None and position_bias is None
        blocks, bias = (known.blocks, None) if is_all else (None, known.matrix())
    elif known is not None:
        window, bias = (known.window, known.keys) if known.sequences is None else (window, known.matrix())
    elif attention_mask is None and causal and query.shape[2] > 1 and not _sees_all(module):
        diagonal = query.shape[2] - key.shape[2]  # 0 in the upper left
        window = (None if back is None else back - diagonal, diagonal)
    if starts is not None:
        if attention_mask is None and query.shape[2] != key.shape[2]:
            raise NotImplementedError("position_bias and indices are not supported with cu_seq_lens_q of its own")
        bias = _both(bias, _same_sequence(starts, query, key))
    if seen is not None:
        bias = _both(bias, seen)
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
    out = mfa_attention(query, key, value, bias, enable_gqa=grouped, window=window, block_mask=blocks, **terms)
    return out.transpose(1, 2).contiguous(), None


def _is_window(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether, but for its sequences, a mask says no more than a window, which is the same within each sequence."""
    if not isinstance(attention_mask, Mask):
        return attention_mask is None
    is_aligned = query.shape[2] == key.shape[2] or (attention_mask.window == (None, None) and query.shape[0] == 1)
    return attention_mask.keys is None and attention_mask.blocks is None and is_aligned


def _sees_all(module: torch.nn.Module) -> bool:
    """Whether None for a mask means just that, as it does to eager attention."""
    config = getattr(module, "config", None)
    return isinstance(config, PreTrainedConfig) and is_eager_only(type(config))


def _both(bias: Tensor | None, seen: Tensor) -> Tensor:
    if bias is None:
        return seen
    return bias & seen if bias.dtype == torch.bool else torch.where(seen, bias, -torch.inf)


def _same_sequence(starts: tuple[Tensor, Tensor], query: Tensor, key: Tensor) -> Tensor:
    """bool [B,1,Lq,Lk]; a token behind the last sequence sees nothing."""
    numbers = []
    for ends, tensor in zip(starts, (query, key), strict=True):
        token = torch.arange(tensor.shape[0] * tensor.shape[2], dtype=ends.dtype, device=ends.device)
        numbers.append(torch.bucketize(token, ends[1:], right=True).view(tensor.shape[0], tensor.shape[2]))
    inside = numbers[0] < len(starts[0]) - 1
    return ((numbers[0][:, :, None] == numbers[1][:, None]) & inside[:, :, None])[:, None]


def _chosen(
    module: Any, query: Tensor, key: Tensor, indices: Tensor | None, block_indices: Tensor | None
) -> Tensor | None:
    """What an indexer has chosen, as bool [B,1 or Hq,Lq,Lk]."""
    size = 1
    if indices is not None:
        indices = indices[:, None]
    elif block_indices is not None:
        size, indices = module.indexer.block_size, block_indices
        indices = indices.repeat_interleave(query.shape[1] // indices.shape[1], 1)
    if indices is None:
        return None
    count = -(-key.shape[2] // size)
    indices = torch.where(indices < 0, count, indices).long()  # to a column that nobody reads
    seen = torch.zeros((*indices.shape[:-1], count + 1), dtype=torch.bool, device=key.device)
    seen = seen.scatter(-1, indices, True)[..., :count]
    return seen.repeat_interleave(size, -1)[..., : key.shape[2]]
