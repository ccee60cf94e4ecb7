"""Continuous batching of transformers: `model.generate_batch`, and `transformers serve --continuous-batching`.

Its list of implementations that can do it is closed: "paged|eager", "sdpa" and names with "flash" in them, whose
package must be there. Nothing public adds one, so `accept` wraps the two functions that look at the name.

A batch is one row of tokens, of requests one behind the other. transformers keeps keys and values in pages. Where every
request has one new token and all layers see all keys, `attend_over_pages` reads them there; elsewhere transformers
gathers them, and attention is that of packed sequences.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..kv_cache import attention_with_kv_cache

_names: set[str] = set()


def accept(name: str) -> None:
    """Has continuous batching take `attn_implementation=name` as it is."""
    if not _names:
        _wrap()
    _names.add(name)


def _wrap() -> None:
    try:
        from transformers import ContinuousBatchingManager
        from transformers.generation.continuous_batching import initialization

        switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
        check = initialization.ensure_decode_fast_path_is_available
    except (ImportError, AttributeError):  # another version: continuous batching refuses the name then
        return

    @wraps(switch)
    def switch_others(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation not in _names:
            switch(self, model, *args, **kwargs)

    @wraps(check)
    def check_others(config: Any, cb_config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation not in _names:
            check(config, cb_config, *args, **kwargs)
            return
        allocators = initialization.ATTN_TYPE_TO_ALLOCATOR
        if not all(allocators[kind].supports_block_table for kind in initialization.group_layers_by_attn_type(config)):
            cb_config.max_blocks_per_request = 0  # none has a block table then

    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch_others
    initialization.ensure_decode_fast_path_is_available = check_others


def accept_in_server() -> None:
    """Has `transformers serve` take them too, whose list of names is closed as well."""
    try:
        from transformers.cli.serving.model_manager import ModelManager
    except ImportError:  # what a server needs is not there, as transformers is going to say
        return
    make = ModelManager.__init__

    @wraps(make)
    def make_with_ours(self: Any, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        is_ours = attn_implementation in _names
        make(self, *args, attn_implementation="sdpa" if is_ours else attn_implementation, **kwargs)
        if is_ours:
            self.attn_implementation = attn_implementation

    ModelManager.__init__ = make_with_ours


def attend_over_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seq_lens_k: Tensor,
    window: tuple[int | None, int | None],
    **terms: Any,
) -> Tensor:
    """A token for each of N requests, which is appended to the pages first.

    Args:
        query: [1,Hq,N,D]; key, value: [1,Hkv,N,D], the new tokens'.
        block_table: int32 [N,pages per request].
        k_cache, v_cache: [pages,page,Hkv,D]; modified.
        cu_seq_lens_k: int32 [N+1], the new tokens counted.
        window, terms: as those of mfa.attention_with_kv_cache.

    Returns:
        out [1,N,Hq,D].
    """
    query, key, value = (tensor.transpose(0, 2) for tensor in (query, key, value))
    lengths = cu_seq_lens_k.diff().to(torch.int32) - 1
    pages = [cache.transpose(1, 2) for cache in (k_cache, v_cache)]
    terms |= {"cache_seqlens": lengths, "block_table": block_table, "window": window}
    out: Tensor = attention_with_kv_cache(query, pages[0], pages[1], key, value, **terms)
    return out.transpose(0, 2).transpose(1, 2)
