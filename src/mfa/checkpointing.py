"""Selective activation checkpointing: the ops whose results are worth their memory.

context_fn = functools.partial(create_selective_checkpoint_contexts, [*mfa.ops_to_save, torch.ops.aten.mm.default])
checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
"""

from typing import Any

from ._ops import ops

# A policy sees what autograd calls, not what users call: where something requires grad the ops with a correction, and
# in a frozen part of a block the others.
ops_to_save: list[Any] = [
    ops.attention_forward_with_correction.default,
    ops.attention_varlen_forward_with_correction.default,
    ops.attention_forward.default,
    ops.attention_varlen_forward.default,
]
