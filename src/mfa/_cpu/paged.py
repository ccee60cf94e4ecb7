"""Packed attention over pages for CPU tensors: `forward.py` on one sequence after the other, its live pages gathered.

Rows that belong to no sequence, behind the last one, see nothing: out 0, lse -inf.
"""

import torch
from torch import Tensor

from .._arguments import Dense, Paged
from .blocks import HIDDEN
from .decode import live_rows
from .forward import attention_forward
from .varlen import Packed, empty_outputs


def attention_varlen_paged(arguments: Paged) -> tuple[Tensor, Tensor]:
    """`mfa::attention_varlen_paged` for CPU tensors. The caller has checked the arguments and their contents.

    Returns:
        out [Tq,Hq,Dv] and lse float32 [Hq,Tq].
    """
    query, table = arguments.query, arguments.block_table
    dtype = torch.promote_types(query.dtype, torch.float32)
    out, lse = empty_outputs(query, arguments.value.shape[3])
    starts, lengths = arguments.cu_seqlens_q.tolist(), arguments.seqused_k.tolist()
    out[starts[-1] :] = 0
    lse[:, starts[-1] :] = HIDDEN
    for n, length in enumerate(lengths):
        if starts[n] == starts[n + 1]:
            continue
        sequence = Packed(n, slice(starts[n], starts[n + 1]), slice(0, length))
        entry = slice(n, n + 1)
        sequence_out, sequence_lse = attention_forward(
            Dense(
                query=sequence.of_queries(query),
                key=live_rows(arguments.key, arguments.key_scale, table, entry, range(length), dtype),
                value=live_rows(arguments.value, arguments.value_scale, table, entry, range(length), dtype),
                bias=None,
                sinks=arguments.sinks,
                alibi_slopes=sequence.slopes(arguments.alibi_slopes),
                scale=arguments.scale,
                window_left=arguments.window_left,
                window_right=arguments.window_right,
                softcap=arguments.softcap,
            ),
            trains=False,
        )
        sequence.of_queries(out).copy_(sequence_out)
        sequence.row_values(lse).copy_(sequence_lse)
    return out, lse
