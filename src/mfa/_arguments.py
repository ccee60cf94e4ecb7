"""What the ops take: for each family a NamedTuple, with fields in the order of its schemas (csrc/library.cpp).

B batch, Hq and Hkv heads, Lq and Lk lengths, D and Dv head dimensions; packed, Tq and Tk tokens of N sequences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


class Dense(NamedTuple):
    """Of `mfa::attention_forward`: one attention problem per batch entry and head."""

    query: Tensor  # [B,Hq,Lq,D], any strides
    key: Tensor  # [B,Hkv,Lk,D]
    value: Tensor  # [B,Hkv,Lk,Dv]
    bias: Tensor | None  # bool (True = attend) or floating; each size is 1 or that of [B,Hq,Lq,Lk]
    sinks: Tensor | None  # [Hq]
    alibi_slopes: Tensor | None  # float32 [Hq] or [B,Hq]
    scale: float
    window_left: int | None = None  # relative to the lower-right diagonal; None is open
    window_right: int | None = None
    softcap: float = 0  # 0 is off
    dropout_p: float = 0
    rng_state: Tensor | None = None  # int64 [2], what dropout starts from: given iff dropout_p > 0
    block_mask: Tensor | None = None  # int32 [words], the data of a PackedBlockMask; given without a bias


class Varlen(NamedTuple):
    """Of `mfa::attention_varlen_forward`: sequences packed one behind the other."""

    query: Tensor  # [Tq,Hq,D], any strides
    key: Tensor  # [Tk,Hkv,D]
    value: Tensor  # [Tk,Hkv,Dv]
    cu_seqlens_q: Tensor  # int32 [N+1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    sinks: Tensor | None  # [Hq]
    alibi_slopes: Tensor | None  # float32 [Hq] or [N,Hq]
    scale: float
    window_left: int | None = None  # relative to each sequence's lower-right diagonal; None is open
    window_right: int | None = None
    softcap: float = 0
    dropout_p: float = 0
    rng_state: Tensor | None = None  # as in Dense; a sequence counts as a batch entry
    seqused_k: Tensor | None = None  # int32 [N], how many keys of each sequence count; None is all


class Decode(NamedTuple):
    """Of `mfa::attention_decode`: few queries over a cache of keys and values."""

    query: Tensor  # [B,Hq,Lq,D]
    key_cache: Tensor  # [B,Hkv,Lmax,D] or pages [pages,Hkv,page,D]; of the query's dtype, or 8-bit numbers
    value_cache: Tensor  # the same with Dv; its dtype may be another of these
    cache_lengths: Tensor  # int32 [B], slots up to the last live token
    block_table: Tensor | None  # int32 [B,pages per sequence], of a paged cache
    key_scale: Tensor | None  # float32, the shape of a quantized cache without its last dimension
    value_scale: Tensor | None
    attn_mask: Tensor | None  # bool [B|1,Hq|1,Lq,K], over the last K live tokens
    cache_leftpad: Tensor | None  # int32 [B], slot of the first live token
    sinks: Tensor | None  # [Hq]
    alibi_slopes: Tensor | None  # float32 [Hq] or [B,Hq]
    scale: float
    window_left: int | None  # relative to the lower-right diagonal of the live part; None is open
    window_right: int | None
    softcap: float
    num_splits: int  # 0 lets the kernels choose


class Append(NamedTuple):
    """Of `mfa::attention_append`: new keys and values for a cache; keys and queries are rotated if there are tables."""

    query: Tensor  # [B,Hq,Lq,D]
    key_cache: Tensor  # as in Decode; modified
    value_cache: Tensor
    key: Tensor  # [B,Hkv,Lnew,D]
    value: Tensor  # [B,Hkv,Lnew,Dv]
    cache_lengths: Tensor | None  # int32 [B], tokens before the new ones
    cache_length: int  # the same for all entries, where cache_lengths is None
    block_table: Tensor | None  # as in Decode
    key_scale: Tensor | None  # modified
    value_scale: Tensor | None
    rotary_cos: Tensor | None  # [positions,R/2], R <= D; float32 or the query's dtype
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None  # int32 [B], positions of the first new tokens; None is cache_lengths
    rotary_interleaved: bool  # pairs are 2i and 2i+1, else i and i+R/2
    queries_advance: bool  # query i is at its key's position, else all are at the first one's

    def decode(self) -> Decode:
        """What attends over the cache, but for its new lengths."""
        lengths: Any = self.cache_lengths
        return Decode(
            query=self.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            cache_lengths=lengths,
            block_table=self.block_table,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            attn_mask=None,
            cache_leftpad=None,
            sinks=None,
            alibi_slopes=None,
            scale=1.0,
            window_left=None,
            window_right=None,
            softcap=0.0,
            num_splits=0,
        )


class Paged(NamedTuple):
    """Of `mfa::attention_varlen_paged`: packed sequences of queries over pages of keys and values."""

    query: Tensor  # [Tq,Hq,D]
    key: Tensor  # pages [pages,Hkv,page,D]; of the query's dtype, int8 or float8_e4m3fn
    value: Tensor  # the same with Dv
    cu_seqlens_q: Tensor  # int32 [N+1]
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor  # int32 [N], live tokens
    block_table: Tensor  # int32 [N,pages per sequence]
    key_scale: Tensor | None  # float32, the shape of quantized pages without their last dimension
    value_scale: Tensor | None
    sinks: Tensor | None  # [Hq]
    alibi_slopes: Tensor | None  # float32 [Hq] or [N,Hq]
    scale: float
    window_left: int | None = None  # relative to the lower-right diagonal of each sequence's live part; None is open
    window_right: int | None = None
    softcap: float = 0
    num_splits: int = 0  # 0 lets the kernels choose


class Backward(NamedTuple):
    """What a backward op takes behind the arguments of its forward op: its results, and their gradients."""

    grad_out: Tensor  # as out
    grad_lse: Tensor | None  # as lse
    out: Tensor  # [B,Hq,Lq,Dv] or [Tq,Hq,Dv]
    lse: Tensor  # float32 [B,Hq,Lq] or [Hq,Tq]
    correction: Tensor | None  # what rounding took from out: float16, as out
    output_mask: Sequence[bool]  # which gradients are wanted, of the arguments that have one (below)


_Forward = TypeVar("_Forward", Dense, Varlen)


def split(kind: type[_Forward], args: tuple[Any, ...]) -> tuple[_Forward, Backward]:
    """The arguments of a backward op: those of its forward op, and the others."""
    count = len(kind._fields)
    return kind._make(args[:count]), Backward._make(args[count:])


# The arguments that have gradients, in the order in which backward ops return them.
DENSE_GRADIENTS = ("query", "key", "value", "bias", "sinks", "alibi_slopes")
VARLEN_GRADIENTS = ("query", "key", "value", "sinks", "alibi_slopes")

# Those that are tensors.
TENSORS: dict[type, tuple[str, ...]] = {
    kind: tuple(name for name, hint in kind.__annotations__.items() if hint in (Tensor, Tensor | None))
    for kind in (Dense, Varlen)
}
