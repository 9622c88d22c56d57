"""The daemon put together: lock, self-test, threads, signals; and its end.

    main thread      ControlLoop: sessions, descriptors, everything that changes the service
    request thread   RequestServer: ZeroMQ requests
    loader thread    one load at a time, with worker threads of its own; posts its result to the main thread
    reader threads   of each store with slots, `expertd.reading`: experts into slots; wake the request thread
    proving thread   one offer of a client at a time, likewise
    metrics thread   where they are wanted, `expertd.metrics`: looks under the lock, changes nothing

SIGTERM and SIGINT drain: no new work, a word to every session, loads dropped. A second one ends at once. SIGHUP has a
daemon in the background make its log anew; one in a terminal has lost it, and drains.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from expertd.adopter import Adopter
from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.config import DaemonConfig
from expertd.control import ControlLoop
from expertd.errors import AlreadyRunning, ExpertdError, LoadCancelled, LoadFailed, PlaceLost
from expertd.handover import TakenStore, prove_kept, take_over
from expertd.lifecycle import (
    BUSY,
    READY,
    DaemonLock,
    MemoryMeter,
    ReadyPipe,
    allow_all_descriptors,
    available_nbytes,
    forbid_inspection,
)
from expertd.loader import LoadedStore, Loader, LoaderSettings, SealedPart
from expertd.log import DaemonLog, begin_log
from expertd.offers import Adoption
from expertd.server import RequestServer
from expertd.service import Service
from expertd.stores import HeldStore
from expertd.supervision import Supervision
from expertd.systemd import ServiceManager
from expertd.tiered import TieredStore, TierSettings
from protocol.errors import OutOfMemory, ProtocolError
from protocol.fault_points import FaultPoint, reached
from protocol.messages import Code, Refused
from protocol.runtime_dir import RuntimeDir
from protocol.segment import check_seals_hold

if TYPE_CHECKING:
    from expertd.metrics import Figures

logger = logging.getLogger(__name__)

# The daemon before has ended when its lock is asked for; one that was started meanwhile may hold it for good.
_LOCK_WITHIN_S = 1.0
# How long a daemon whose directory is gone holds memory that nobody can ask for.
_PLACE_TICK_S = 2.0


@dataclass(frozen=True, slots=True)
class StoreOrder:
    """A store to be loaded at start."""

    path: Path
    digest: str
    wish: MemoryWish = ALL_THERE_IS


def run_daemon(
    config: DaemonConfig,
    directory: RuntimeDir,
    orders: Sequence[StoreOrder],
    ready: ReadyPipe,
    manager: ServiceManager,
    *,
    takes_over: bool = False,
) -> None:
    """Be the daemon until told to stop; raise ExpertdError or ProtocolError, LoadFailed for a store of `orders`.

    `takes_over`: with the stores, and in the place, of the daemon that runs.
    """
    log = begin_log(
        directory, level=config.log_level, is_json=config.log_format == "json", nbytes_max=config.log_nbytes_max
    )
    os.umask(0o077)
    forbid_inspection()
    allow_all_descriptors()
    check_seals_hold()
    taken = take_over(directory, n_threads=config.n_loader_threads) if takes_over else []
    try:
        lock = DaemonLock(directory, within_s=_LOCK_WITHIN_S if takes_over else 0.0)
    except AlreadyRunning:
        ready.tell(BUSY)
        raise
    with lock:
        kept = manager.take_kept()
        proven = prove_kept(kept, n_threads=config.n_loader_threads)
        for digest in {store.digest for store in kept} - {store.digest for store in proven}:
            manager.let_go(digest)
        taken += proven
        daemon = Daemon(config, directory, ready, manager, log, place=lock)
        daemon.run(orders, taken)


class Daemon:
    """The threads of the daemon and what passes between them."""

    def __init__(
        self,
        config: DaemonConfig,
        directory: RuntimeDir,
        ready: ReadyPipe,
        manager: ServiceManager,
        log: DaemonLog,
        *,
        place: DaemonLock,
    ) -> None:
        self._config = config
        self._place = place
        self._manager = manager
        self._ready: ReadyPipe | None = ready
        self._awaited: list[HeldStore] = []
        self._failure: ExpertdError | None = None
        self._n_signals = 0
        self._directory = directory
        self._log = log
        self._meter = MemoryMeter()
        now = time.monotonic()
        self._service = Service(
            uid=os.geteuid(),
            pid=os.getpid(),
            new_token=secrets.token_bytes,
            memory=self._meter.figures,
            now=now,
            wake_requests=self._wake_requests,
        )
        self._lock = lock = threading.Lock()
        self._adopter = Adopter(
            n_threads=config.n_loader_threads,
            post=self._post,
            on_taken=self._on_taken,
            on_failed=self._on_not_taken,
        )
        self._supervision = Supervision(manager, self._service, lock, clock=time.monotonic)
        self._loads = ThreadPoolExecutor(1, "expertd-loader")
        self._control = ControlLoop(
            directory,
            self._service,
            lock,
            clock=time.monotonic,
            start_load=self._start_load,
            start_adoption=self._start_adoption,
            idle_timeout_s=config.idle_timeout_s or None,
            after_round=self._after_round,
            tick_s=min(_PLACE_TICK_S, self._supervision.tick_s or _PLACE_TICK_S),
        )
        self._requests = RequestServer(
            directory,
            self._service,
            lock,
            clock=time.monotonic,
            drop_session=lambda session: self._control.post(lambda: self._control.drop_session(session)),
            on_failure=self._on_request_thread_failed,
        )
        self._tier_settings = TierSettings(
            config.reader_threads,
            config.read_limit_nbytes_per_s,
            wake=self._wake_requests,
            on_failure=self._on_reader_failed,
        )

    def run(self, orders: Sequence[StoreOrder], taken: Sequence[TakenStore] = ()) -> None:
        """Serve until stopped, with the stores of a daemon before; raise LoadFailed if one of `orders` cannot be."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        held = self._hold(taken)
        self._awaited = [self._service.begin_load(o.path, o.digest, o.wish) for o in orders if o.digest not in held]
        unfinished = self._begin_again(taken)
        self._requests.start()
        with self._ended_at_last(), self._metrics_served():
            for store in (*self._awaited, *unfinished):
                self._start_load(store)
            self._control.post(self._tell_ready)
            logger.info("serving pid=%d stores=%d taken=%d", os.getpid(), len(orders), len(held))
            self._control.run()
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _ended_at_last(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._manager.tell_stopping()
            self._requests.stop()
            self._control.close()
            reached(FaultPoint.DAEMON_SOCKETS_CLOSED)
            self._adopter.close()
            self._loads.shutdown(wait=True, cancel_futures=True)
            self._service.close()
            self._meter.close()
            logger.info("ended pid=%d", os.getpid())

    @contextmanager
    def _metrics_served(self) -> Iterator[None]:
        """Serve metrics meanwhile, if they are wanted; without them nothing of it is imported, and no thread runs."""
        if self._config.metrics == "off":
            yield
            return
        from expertd.metrics import MetricsServer

        with MetricsServer(self._config.metrics_address or self._directory.metrics_socket, self._figures):
            yield

    def _figures(self) -> "Figures":
        from expertd.metrics import Figures

        with self._lock:
            held, now = self._service.held_stores(), time.monotonic()
            loaded = [store.loaded for store in held if store.loaded is not None]
            return Figures(
                status=self._service.status(now),
                counters=self._service.counters.copy(),
                slot_use=self._service.slot_use(now),
                n_segments=sum(len(store.fds) for store in loaded),
                huge_nbytes=sum(store.huge_nbytes for store in loaded),
                leases_lost={store.digest: store.tiered.slots.n_leases_lost for store in held if store.tiered},
            )

    def _hold(self, taken: Sequence[TakenStore]) -> set[str]:
        """Serve what is in memory already; return its digests."""
        for store in taken:
            if store.loaded is not None:
                logger.info("store taken digest=%s nbytes=%d", store.digest[:12], store.loaded.nbytes)
                self._service.hold(store.path, store.loaded)
        return {store.digest for store in taken if store.loaded is not None}

    def _begin_again(self, taken: Sequence[TakenStore]) -> list[HeldStore]:
        """Return what is to be loaded beside the stores of the start; each goes on from what is sealed of it."""
        begun = {store.digest: store for store in self._awaited}
        wanted = {store.digest for store in taken if not store.is_unloaded} | begun.keys()
        unfinished = []
        for found in taken:
            if found.is_unloaded and found.digest not in wanted:
                self._service.offers.refuse(found.digest)
            elif found.loaded is None and not found.is_unloaded:
                store = begun.get(found.digest)
                if store is None:
                    store = self._service.begin_load(found.path, found.digest, found.wish)
                    unfinished.append(store)
                store.sealed, store.awaits_offers = found.sealed, found.sealed is None
        return unfinished

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._log.is_ours:
            self._log.reopen()
            return
        self._n_signals += 1
        if self._n_signals > 1:
            os._exit(1)
        self._control.stop()

    def _after_round(self) -> None:
        """Tell the service manager what is new; end where no client can come any more."""
        self._supervision.after_round()
        if self._failure is None and not self._place.is_in_place():
            self._failure = PlaceLost("the runtime directory was removed or replaced, and no client finds it any more")
            self._control.stop()

    def _on_request_thread_failed(self) -> None:
        self._failure = ExpertdError("the request thread failed; the log has the story")
        self._control.stop()

    def _on_reader_failed(self) -> None:
        self._failure = ExpertdError("a reader thread failed; the log has the story")
        self._control.stop()

    def _wake_requests(self) -> None:
        self._requests.wake()

    def _start_load(self, store: HeldStore) -> None:
        self._loads.submit(self._load, store)

    def _start_adoption(self, adoption: Adoption) -> None:
        self._adopter.start(adoption)

    def _load(self, store: HeldStore) -> None:
        """Load in the loader thread and post what came of it."""
        with self._lock:
            attached_pids = self._service.attached_pids()
        if not self._adopter.still_needs_reading(store, attached_pids):
            return
        with self._lock:
            sealed = store.begin()
        settings = LoaderSettings(self._config.n_loader_threads, self._config.collapse_budget_s)
        try:
            loader = Loader(
                settings, available_nbytes, store.progress, partial(TieredStore, settings=self._tier_settings)
            )
            loaded = loader.load(store.path, store.digest, store.wish, sealed)
        except LoadCancelled:
            return
        except OutOfMemory as error:
            self._post_failure(store, Code.OUT_OF_MEMORY, str(error))
        except (ExpertdError, ProtocolError, OSError) as error:
            self._post_failure(store, Code.STORE_INVALID, str(error))
        except Exception:  # the one net of this thread: a load that dies in silence would look like one that hangs
            logger.exception("load failed by a fault of ours digest=%s", store.digest[:12])
            self._post_failure(store, Code.STORE_INVALID, "expertd failed while loading; its log has the story")
        else:
            self._control.post(lambda: self._on_loaded(store, loaded))

    def _post(self, action: Callable[[], None]) -> None:
        self._control.post(action)

    def _on_taken(self, adoption: Adoption, proven: LoadedStore | SealedPart) -> None:
        store, nbytes, offers = adoption.store, proven.nbytes, self._service.offers
        if isinstance(proven, SealedPart):
            reply = offers.taken_in_part(adoption, proven)
        else:
            reply = offers.taken(adoption, proven)
        logger.info(
            "store offered digest=%s pid=%d nbytes=%d is_all=%s answer=%s",
            store.digest[:12], adoption.session.peer.pid, nbytes, isinstance(proven, LoadedStore), reply,
        )  # fmt: skip
        self._control.answer(adoption.session, reply)
        if offers.begin_load(store):
            self._start_load(store)
        self._tell_ready()

    def _on_not_taken(self, adoption: Adoption, refused: Refused | None) -> None:
        reply = self._service.offers.failed(adoption, refused)
        logger.warning(
            "store offered, not taken digest=%s pid=%d answer=%s",
            adoption.store.digest[:12], adoption.session.peer.pid, reply,
        )  # fmt: skip
        self._control.answer(adoption.session, reply)

    def _post_failure(self, store: HeldStore, code: Code, detail: str) -> None:
        self._control.post(lambda: self._on_failed(store, code, detail))

    def _on_loaded(self, store: HeldStore, loaded: LoadedStore) -> None:
        reached(FaultPoint.DAEMON_STORE_LOADED)
        rate = loaded.nbytes / max(loaded.load_s, 1e-9) / 1e9
        logger.info(
            "store loaded digest=%s nbytes=%d load_s=%.2f gb_per_s=%.2f huge_nbytes=%d corrupt=%d",
            store.digest[:12], loaded.nbytes, loaded.load_s, rate, loaded.huge_nbytes, len(loaded.corrupt),
        )  # fmt: skip
        self._service.store_loaded(store, loaded, time.monotonic())
        self._tell_ready()

    def _on_failed(self, store: HeldStore, code: Code, detail: str) -> None:
        logger.error("store not loaded digest=%s code=%s detail=%s", store.digest[:12], code, detail)
        self._service.store_failed(store, code, detail)
        if any(store is awaited for awaited in self._awaited):
            self._failure = LoadFailed(f"{store.path}: {detail}")
            self._control.stop()

    def _tell_ready(self) -> None:
        """Say READY once, when every store of the start is in memory."""
        if self._ready is not None and all(store.loaded for store in self._awaited):
            reached(FaultPoint.DAEMON_READY)
            self._ready.tell(READY)
            self._manager.tell_ready()
            self._ready = None
