"""What the matrix products of one runner reuse from call to call: scratch memory, and threads that share the work.

One call at a time: a workspace belongs to the thread that computes. Its own threads only ever run what that call gives
them, on results that no other of them touches, and the call waits for all of them.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# Below this many weights a second thread costs more than it gives.
_NELEMENTS_PER_THREAD_MIN = 1 << 19


class Workspace:
    """Scratch memory and `n_threads` threads, the caller's among them; close it, or use it in a `with`."""

    def __init__(self, n_threads: int = 1) -> None:
        self.n_threads = n_threads
        # What each thread has for itself: its scratch memory, and whether it works on a share.
        self._own = threading.local()
        # OpenMP keeps its number of threads by thread: without this each of ours would bring a team of its own.
        self._pool = ThreadPoolExecutor(n_threads - 1, "quant", torch.set_num_threads, (1,)) if n_threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def matrix(self, rows: int, cols: int) -> Tensor:
        """Return scratch memory as f32 [rows, cols], of any content; this thread's next call reuses it."""
        scratch: Tensor | None = getattr(self._own, "scratch", None)
        if scratch is None or scratch.numel() < rows * cols:
            scratch = self._own.scratch = torch.empty(rows * cols)
        return scratch[: rows * cols].view(rows, cols)

    def split(self, n_items: int, item_nelements: int, work: Callable[[int, int], None]) -> None:
        """Call work(first, n) for ranges that cover all items, each of so many weights, on the threads.

        Work that splits again does the inner part by itself: its siblings are busy, and waiting for them could be for
        ever.
        """
        n_threads = 1 if getattr(self._own, "is_sharing", False) else self.n_threads
        n_shares = min(n_threads, n_items, max(1, n_items * item_nelements // _NELEMENTS_PER_THREAD_MIN))
        edges = [n_items * share // n_shares for share in range(n_shares + 1)] if n_items else [0]
        ranges = [(first, last - first) for first, last in itertools.pairwise(edges)]
        if self._pool is None or len(ranges) <= 1:
            for first, n in ranges:
                work(first, n)
            return
        pending = [self._pool.submit(self._share, work, first, n) for first, n in ranges[1:]]
        try:
            self._share(work, *ranges[0])
        finally:
            # Also after an error: the others write to memory that the caller would free.
            errors = [future.exception() for future in pending]
        for error in errors:
            if error is not None:
                raise error

    def _share(self, work: Callable[[int, int], None], first: int, n: int) -> None:
        self._own.is_sharing = True
        try:
            work(first, n)
        finally:
            self._own.is_sharing = False
