"""Padded batches as packed ones, and back: flash_attn.bert_padding, for code that wants it."""

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002 (as flash-attn calls it)
    """Rows of a tensor [T,...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows [T,...] at `indices` of a tensor of `first_axis_dim` rows; zeros elsewhere."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


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


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of short sequences, several to a row of hidden_states [B,L,...], from its start on.

    Args:
        hidden_states: [B,L,...].
        attention_mask_in_length: integers [B,L]: the lengths of a row's sequences in their order, zeros among them.

    Returns:
        tokens [T,...], their indices in [B*L], cu_seqlens int32, and the longest length.
    """
    used = attention_mask_in_length.sum(-1, keepdim=True)
    columns = torch.arange(attention_mask_in_length.shape[1], device=used.device)
    indices = (columns < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What `unpad_input` packed, back in [B,L,...]; zeros elsewhere."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])
