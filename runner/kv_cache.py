"""The keys and values of one sequence, of all layers, in memory reserved once. Knows no model and no attention.

The system gives memory for the pages that are written, so a long context costs nothing before it is used.
"""

import os

import torch

from quant.layer import KEY_BLOCK
from runner.errors import ContextFull, OutOfMemory


def kv_cache_nbytes(n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return how many bytes the keys and values of that many tokens take, in whole blocks."""
    return 2 * n_layers * n_kv_heads * -(-context // KEY_BLOCK) * KEY_BLOCK * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of one sequence of at most `context` tokens, `length` tokens of them computed.

    `keys` [n_layers, n_kv_heads, n_blocks, head_dim, KEY_BLOCK] and `values` [n_layers, n_kv_heads, n_blocks *
    KEY_BLOCK, head_dim] are as quant.layer's attention takes them. A step has each layer's written behind `length` and
    advances once at its end: one that fails halfway leaves no trace. Making one raises OutOfMemory if its memory cannot
    be had.
    """

    def __init__(self, *, n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> None:
        n_blocks = -(-context // KEY_BLOCK)
        nbytes = kv_cache_nbytes(n_layers, n_kv_heads, context, head_dim, dtype)
        # More than the machine has can be reserved, but never be filled.
        installed_nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if nbytes > installed_nbytes:
            raise _too_large(context, nbytes, f"this machine has {installed_nbytes}")
        try:
            self.keys = torch.empty(n_layers, n_kv_heads, n_blocks, head_dim, KEY_BLOCK, dtype=dtype)
            self.values = torch.empty(n_layers, n_kv_heads, n_blocks * KEY_BLOCK, head_dim, dtype=dtype)
        except RuntimeError:
            raise _too_large(context, nbytes, "the system does not give them") from None
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


def _too_large(context: int, nbytes: int, had: str) -> OutOfMemory:
    return OutOfMemory(
        f"a context of {context} tokens needs {nbytes} bytes for keys and values, {had}; a smaller --context may fit"
    )
