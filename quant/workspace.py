"""What the matrix products of one runner reuse from call to call: scratch memory, and threads that split rows.

One call at a time: a workspace belongs to the thread that computes. Its own threads only ever run what that call gives
them, on rows that no other of them touches, and the call waits for all of them.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from protocol.layout import PANEL_ROWS

# Below this many weights a second thread costs more than it gives.
_NELEMENTS_PER_THREAD_MIN = 1 << 18


class Workspace:
    """Scratch memory and `n_threads` threads, the caller's among them; close it, or use it in a `with`."""

    def __init__(self, n_threads: int = 1) -> None:
        self.n_threads = n_threads
        self._scratch = torch.empty(0)
        self._pool = ThreadPoolExecutor(n_threads - 1, "quant") if n_threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def matrix(self, rows: int, cols: int) -> Tensor:
        """Return scratch memory as f32 [rows, cols], of any content; the next call reuses it."""
        if self._scratch.numel() < rows * cols:
            self._scratch = torch.empty(rows * cols)
        return self._scratch[: rows * cols].view(rows, cols)

    def split_rows(self, rows: int, cols: int, work: Callable[[int, int], None]) -> None:
        """Call work(first_row, n_rows) for ranges that cover all rows, whole panels each, on the threads."""
        n_shares = min(self.n_threads, max(1, rows * cols // _NELEMENTS_PER_THREAD_MIN))
        n_panels = -(-rows // PANEL_ROWS)
        edges = [min(rows, n_panels * share // n_shares * PANEL_ROWS) for share in range(n_shares + 1)]
        ranges = [(first, last - first) for first, last in itertools.pairwise(edges) if last > first]
        if self._pool is None or len(ranges) == 1:
            for first_row, n_rows in ranges:
                work(first_row, n_rows)
            return
        pending = [self._pool.submit(work, first_row, n_rows) for first_row, n_rows in ranges[1:]]
        try:
            work(*ranges[0])
        finally:
            # Also after an error: the others write to memory that the caller would free.
            errors = [future.exception() for future in pending]
        for error in errors:
            if error is not None:
                raise error
