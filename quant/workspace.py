"""The threads of one runner and the memory they reuse from call to call: the door to csrc/workspace.h.

One call at a time: a workspace belongs to the thread that computes; a second one that tries meanwhile gets
WorkspaceBusy. Its own threads only ever run what that call gives them. Without the C library there are none, and the
caller's thread computes alone.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from quant.errors import QuantError
from quant.library import check_status, library

# csrc/workspace.c
THREADS_MAX = 1024


class Workspace:
    """`n_threads` threads, the caller's among them; close it, or use it in a `with`."""

    def __init__(self, n_threads: int = 1) -> None:
        if not 1 <= n_threads <= THREADS_MAX:
            raise QuantError(f"a workspace has 1 to {THREADS_MAX} threads, not {n_threads}")
        self.n_threads = n_threads
        self._library = library()
        # What the library's functions take; None once closed, or without the library.
        self.address: ctypes.c_void_p | None = None
        if self._library is not None:
            address = ctypes.c_void_p()
            check_status(
                self._library.expertd_workspace_start(ctypes.c_int64(n_threads), ctypes.byref(address)),
                f"{n_threads} threads",
            )
            self.address = address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give the memory back; raise WorkspaceBusy if another thread computes with them."""
        address = getattr(self, "address", None)
        if address is not None and self._library is not None:
            check_status(self._library.expertd_workspace_stop(address), "closing a workspace")
        self.address = None

    @property
    def products_s(self) -> float:
        """The seconds that calls spent in matrix products so far, waits for threads included; 0 without the library."""
        if self.address is None or self._library is None:
            return 0.0
        products_ns = ctypes.c_int64()
        status = self._library.expertd_workspace_products_ns(self.address, ctypes.byref(products_ns))
        check_status(status, "the time of products")
        return products_ns.value / 1e9

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the threads awake between calls that follow each other closely, as a token's do.

        Each waits at most 100 µs for the next call before it sleeps; waking it again takes as long.
        """
        self._stay_awake(stays_awake=True)
        try:
            yield
        finally:
            self._stay_awake(stays_awake=False)

    def _stay_awake(self, *, stays_awake: bool) -> None:
        if self.address is not None and self._library is not None:
            self._library.expertd_workspace_stay_awake(self.address, ctypes.c_int64(stays_awake))
