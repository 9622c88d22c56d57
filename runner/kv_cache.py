"""The keys and values of one sequence, of all layers, in memory reserved once. Knows no model and no attention.

The system gives the host's memory for the pages that are written, so a long context costs nothing before it is used; a
device's is taken at once.
"""

import os

import torch
from torch import Tensor

from quant.layer import KEY_BLOCK
from runner.errors import ContextFull, OutOfMemory


def kv_cache_nbytes(n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return how many bytes the keys and values of that many tokens take, in whole blocks."""
    return 2 * n_layers * n_kv_heads * -(-context // KEY_BLOCK) * KEY_BLOCK * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of one sequence of at most `context` tokens, `length` tokens of them computed.

    A step has each layer's written behind `length` and advances once at its end: one that fails halfway leaves no
    trace. How they lie is for whoever made them and computes with them.
    """

    def __init__(self, keys: Tensor, values: Tensor, context: int) -> None:
        self.keys = keys
        self.values = values
        self.context = context
        self.length = 0

    def check_room(self, n_tokens: int) -> None:
        """Raise ContextFull unless that many tokens fit behind those that are there."""
        if self.length + n_tokens > self.context:
            raise ContextFull(
                f"the context holds {self.context} tokens: {self.length} are there, {n_tokens} more were asked for; "
                "a larger --context has room"
            )

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += n_tokens


def reserve_kv_cache(*, n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    """Return an empty one in the host's memory, as quant.layer's attention takes it; raise OutOfMemory.

    keys [n_layers, n_kv_heads, n_blocks, head_dim, KEY_BLOCK], values [n_layers, n_kv_heads, n_blocks * KEY_BLOCK,
    head_dim].
    """
    n_blocks = -(-context // KEY_BLOCK)
    nbytes = kv_cache_nbytes(n_layers, n_kv_heads, context, head_dim, dtype)
    # More than the machine has can be reserved, but never be filled.
    installed_nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > installed_nbytes:
        raise _too_large(context, nbytes, f"this machine has {installed_nbytes}")
    try:
        keys = torch.empty(n_layers, n_kv_heads, n_blocks, head_dim, KEY_BLOCK, dtype=dtype)
        values = torch.empty(n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim, dtype=dtype)
    except RuntimeError:
        raise _too_large(context, nbytes, "the system does not give them") from None
    return KVCache(keys, values, context)


def allocate_kv_cache(
    device: torch.device, *, n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype
) -> KVCache:
    """Return an empty one in a device's memory, all of it taken now; raise OutOfMemory.

    Both are [n_layers, n_kv_heads, context, head_dim], the context in whole blocks as on the host.
    """
    nbytes = kv_cache_nbytes(n_layers, n_kv_heads, context, head_dim, dtype)
    shape = (n_layers, n_kv_heads, -(-context // KEY_BLOCK) * KEY_BLOCK, head_dim)
    try:
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    except RuntimeError:
        raise _too_large(context, nbytes, f"{device} does not give them") from None
    return KVCache(keys, values, context)


def _too_large(context: int, nbytes: int, had: str) -> OutOfMemory:
    return OutOfMemory(
        f"a context of {context} tokens needs {nbytes} bytes for keys and values, {had}; a smaller --context may fit"
    )
