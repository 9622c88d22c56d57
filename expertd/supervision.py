"""What the daemon tells its service manager, round by round: that it lives, what it does, what to keep.

Called by the main thread behind every round of its loop, so that a loop that hangs feeds no watchdog. Holds the
service's lock to look, never to tell.
"""

import threading
from collections.abc import Callable

from expertd.service import Service
from expertd.stores import HeldStore
from expertd.systemd import KeptStore, ServiceManager
from protocol.messages import StoreState

_TICK_S = 1.0


class Supervision:
    """The main thread's word to the manager; without one it does nothing."""

    def __init__(
        self,
        manager: ServiceManager,
        service: Service,
        lock: threading.Lock,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._service = service
        self._lock = lock
        self._clock = clock
        self._alive_at: float | None = None

    @property
    def tick_s(self) -> float | None:
        """How often something is to be told even if nothing happens; None: never."""
        if not self._manager.is_there:
            return None
        watchdog_s = self._manager.watchdog_s
        return _TICK_S if watchdog_s is None else min(_TICK_S, watchdog_s / 2)

    def after_round(self) -> None:
        """Tell what is new."""
        if not self._manager.is_there:
            return
        with self._lock:
            stores = [store for store in self._service.held_stores() if store.state is not StoreState.ORPHANED]
            # Slots are of no use to another daemon, and kept they would take their memory twice.
            ready = [
                KeptStore(store.path, store.digest, store.wish.memory_nbytes, store.loaded.sealed_fds)
                for store in stores
                if store.loaded is not None
            ]
            loading = {store.digest for store in stores if store.state is StoreState.LOADING}
            status = status_line(stores)
        self._manager.keep_only(ready, loading)
        self._manager.tell_status(status)
        self._feed_watchdog()

    def _feed_watchdog(self) -> None:
        watchdog_s, now = self._manager.watchdog_s, self._clock()
        if watchdog_s is None or (self._alive_at is not None and now - self._alive_at < watchdog_s / 4):
            return
        self._alive_at = now
        self._manager.tell_alive()


def status_line(stores: list[HeldStore]) -> str:
    """Return what the daemon does, in a line."""
    ready = [store for store in stores if store.state is StoreState.READY]
    words = [f"{len(ready)} store(s), {sum(store.nbytes for store in ready) / 1e9:.2f} GB in memory"]
    for store in stores:
        if store.state is StoreState.LOADING:
            words.append(f"loading {store.path.name}: {store.progress.loaded_nbytes / 1e9:.2f} GB")
        elif store.error is not None:
            words.append(f"{store.path.name} could not be loaded")
    return "; ".join(words)
