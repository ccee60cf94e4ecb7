"""FlexAttention's signature over `mfa.attention`: block masks, without a compiler."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import _log
from .attention import attention
from .block_mask import PackedBlockMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: "BlockMask | PackedBlockMask | None" = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.attention.flex_attention.flex_attention`, with gradients on every device; no mask is compiled.

    Args:
        query: [B,Hq,Lq,D]. key: [B,Hkv,Lk,D]. value: [B,Hkv,Lk,Dv]. As in `attention`.
        score_mod: must be None.
        block_mask: as in `attention`.
        kernel_options: choose tiles of torch's kernels; they are logged and change nothing here.

    Returns:
        out [B,Hq,Lq,Dv]; with return_lse also lse [B,Hq,Lq], float32, in natural logarithms as torch's.

    Raises:
        NotImplementedError: a score_mod, which would have to be compiled; and as `attention` does.
    """
    if score_mod is not None:
        raise NotImplementedError(
            "score_mod is given; mfa compiles no functions. softcap, alibi_slopes, window and an additive attn_mask of "
            "mfa.attention do what most of them do"
        )
    if kernel_options:
        _log.once("kernel_options of flex_attention choose tiles of torch's kernels; mfa has its own")
    out, lse = attention(query, key, value, None, 0, False, scale, enable_gqa, block_mask=block_mask, return_lse=True)
    return (out, lse) if return_lse else out
