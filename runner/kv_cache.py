"""The keys and values of one sequence, of all layers, in memory reserved once. Knows no model and no attention.

The system gives memory for the pages that are written, so a long context costs nothing before it is used.
"""

import math
import os

import torch
from torch import Tensor

from runner.errors import ContextFull, OutOfMemory


class KVCache:
    """Keys and values [n_layers, n_kv_heads, context, head_dim] of one sequence, `length` tokens of them computed.

    A step writes each layer behind `length` and advances once at its end: one that fails halfway leaves no trace.
    Making one raises OutOfMemory if its memory cannot be had.
    """

    def __init__(self, *, n_layers: int, n_kv_heads: int, context: int, head_dim: int, dtype: torch.dtype) -> None:
        shape = (n_layers, n_kv_heads, context, head_dim)
        nbytes = 2 * math.prod(shape) * dtype.itemsize
        # More than the machine has can be reserved, but never be filled.
        installed_nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if nbytes > installed_nbytes:
            raise _too_large(context, nbytes, f"this machine has {installed_nbytes}")
        try:
            self._keys = torch.empty(shape, dtype=dtype)
            self._values = torch.empty(shape, dtype=dtype)
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

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values [n_kv_heads, T, head_dim] of the T tokens behind `length`."""
        end = self.length + keys.shape[1]
        self._keys[layer, :, self.length : end] = keys
        self._values[layer, :, self.length : end] = values

    def read(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of tokens first..end-1, fp32, each [n_kv_heads, end - first, head_dim]."""
        return self._keys[layer, :, first:end].float(), self._values[layer, :, first:end].float()

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += n_tokens


def _too_large(context: int, nbytes: int, had: str) -> OutOfMemory:
    return OutOfMemory(
        f"a context of {context} tokens needs {nbytes} bytes for keys and values, {had}; a smaller --context may fit"
    )
