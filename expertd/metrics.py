"""The daemon's figures for Prometheus, on a socket in the runtime directory or a port of the loopback. Off by default.

A thread waits for connections and gives each one of its own, four at most. What they show is copied under the service's
lock in one go, so a scraper that does not read waits for nobody and nobody waits for it; after some seconds it is hung
up on. Names and labels are those of docs/operations.md; no label names an expert.
"""

import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from expertd.counters import Counters, Durations, SlotUse
from expertd.errors import StartFailed
from protocol.messages import Status, StoreState
from protocol.version import HIGHEST_PROTOCOL_VERSION

logger = logging.getLogger(__name__)

_CONNECTIONS_MAX = 4
_SILENT_S = 5.0
_IN_ALL_S = 10.0
_OUT_OF_DESCRIPTORS_S = 0.5
# So long the daemon's end waits for this thread at most.
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is shown, of one moment."""

    status: Status
    counters: Counters
    slot_use: SlotUse
    n_segments: int
    huge_nbytes: int
    leases_lost: Mapping[str, int]


class DaemonCollector(Collector):
    """Writes the figures down as metrics, anew for each scrape."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """Return all metrics."""
        figures = self._figures()
        yield from _of_the_daemon(figures)
        yield from _of_stores(figures.status)
        yield from _of_slots(figures)
        yield from _of_sessions(figures.slot_use)
        yield from _of_requests(figures.counters)
        yield from _of_loads(figures.counters)


class MetricsServer:
    """Serves the metrics from a thread of its own, from `with` on to its end."""

    def __init__(self, place: Path | tuple[str, int], figures: Callable[[], Figures]) -> None:
        """Bind to a socket's path or a loopback address; raise StartFailed."""
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(DaemonCollector(figures))
        handler = type("_Handler", (MetricsHandler,), {"registry": registry, "timeout": _SILENT_S})
        try:
            self._server = _UnixServer(str(place), handler) if isinstance(place, Path) else _TcpServer(place, handler)
        except OSError as error:
            raise StartFailed(f"metrics: {place} cannot be listened at ({error.strerror})") from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_EVERY_S,), name="expertd-metrics", daemon=True
        )

    @property
    def address(self) -> Any:  # noqa: ANN401 - a path or host and port, as the socket module has them
        """Where it listens."""
        return self._server.server_address

    def __enter__(self) -> "MetricsServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _BoundedServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each of a few connections; none of them lasts."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: Any, handler: type[MetricsHandler]) -> None:  # noqa: ANN401 - as the base has it
        self._since: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Return a connection. Without a descriptor for it the loop would turn without pause."""
        try:
            return super().get_request()
        except OSError:
            threading.Event().wait(_OUT_OF_DESCRIPTORS_S)
            raise

    def verify_request(self, request: Any, _address: Any) -> bool:  # noqa: ANN401 - as the base has it
        """Whether there is room for one more."""
        with self._lock:
            if len(self._since) >= _CONNECTIONS_MAX:
                return False
            self._since[request] = time.monotonic()
            return True

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as the base has it
        """Hang up."""
        with self._lock:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Hang up on whoever takes too long; called after every look."""
        with self._lock:
            overdue = [sock for sock, since in self._since.items() if time.monotonic() - since > _IN_ALL_S]
            for sock in overdue:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, _request: Any, _address: Any) -> None:  # noqa: ANN401 - as the base has it
        """Say in the log what a scraper did, most often that it left."""
        logger.debug("a scrape failed error=%r", sys.exc_info()[1])


class _TcpServer(_BoundedServer):
    """On the loopback."""

    def __init__(self, address: tuple[str, int], handler: type[MetricsHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _UnixServer(_BoundedServer):
    """At a path in a directory that is closed to others. Whoever holds the daemon's lock clears it away."""

    address_family = socket.AF_UNIX


def _of_the_daemon(figures: Figures) -> Iterator[Metric]:
    status = figures.status
    build = GaugeMetricFamily("expertd_build_info", "The daemon's version.", labels=["version", "protocol"])
    build.add_metric([status.library_version, str(HIGHEST_PROTOCOL_VERSION)], 1)
    yield build
    yield GaugeMetricFamily("expertd_sessions", "Open sessions.", value=len(status.sessions))
    memory = GaugeMetricFamily("expertd_memory_bytes", "Its own memory; what is available here.", labels=["kind"])
    memory.add_metric(["private"], status.private_nbytes)
    memory.add_metric(["available"], status.available_nbytes)
    yield memory
    with suppress(OSError):  # with no descriptor left it cannot be counted how many there are
        n_fds = sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1
        yield GaugeMetricFamily("expertd_open_fds", "Open descriptors.", value=n_fds)
    yield GaugeMetricFamily("expertd_segments", "Segments of shared memory.", value=figures.n_segments)
    yield GaugeMetricFamily("expertd_huge_page_bytes", "Store bytes in huge pages.", value=figures.huge_nbytes)


def _of_stores(status: Status) -> Iterator[Metric]:
    held = GaugeMetricFamily("expertd_store_bytes", "Bytes of shared memory in stores.", labels=["state"])
    for state in StoreState:
        held.add_metric([state], sum(store.nbytes for store in status.stores if store.state is state))
    yield held
    wrong = CounterMetricFamily(
        "expertd_checksum_failures", "Experts whose bytes were wrong.", labels=["when", "store"]
    )
    for store in status.stores:
        wrong.add_metric(["load", store.digest[:12]], store.n_corrupt)
    yield wrong


def _of_slots(figures: Figures) -> Iterator[Metric]:
    """Of each store that is larger than its memory. A store that is unloaded takes its series with it."""
    slots = GaugeMetricFamily("expertd_slots", "Host slots.", labels=["store", "state"])
    loads = CounterMetricFamily("expertd_slot_loads", "Experts read into slots.", labels=["store"])
    nbytes = CounterMetricFamily("expertd_slot_load_bytes", "Bytes read into slots.", labels=["store"])
    expired = CounterMetricFamily("expertd_lease_expired", "Leases taken from their holders.", labels=["store"])
    for store in figures.status.stores:
        if not store.n_slots:
            continue
        name = store.digest[:12]
        slots.add_metric([name, "used"], store.n_used_slots)
        slots.add_metric([name, "free"], store.n_slots - store.n_used_slots)
        loads.add_metric([name], store.n_loads)
        nbytes.add_metric([name], store.read_nbytes)
        expired.add_metric([name], figures.leases_lost.get(store.digest, 0))
    held = sum(session.n_leases for session in figures.status.sessions)
    yield from (slots, loads, nbytes, expired)
    yield GaugeMetricFamily("expertd_lease_held", "Leases of all sessions.", value=held)


def _of_sessions(use: SlotUse) -> Iterator[Metric]:
    yield CounterMetricFamily("expertd_slot_hits", "Experts that were in a slot when wanted.", value=use.n_hits)
    yield CounterMetricFamily("expertd_slot_misses", "Experts that were waited for.", value=use.n_misses)
    yield CounterMetricFamily("expertd_waited_seconds", "Time that sessions waited for experts.", value=use.waited_s)
    outcomes = dict.fromkeys(("used", "late", "wasted", "dropped"), 0) | use.prefetches
    yield _counted("expertd_prefetch", "Experts foreseen, by what came of it.", "outcome", outcomes)


def _of_requests(counters: Counters) -> Iterator[Metric]:
    requests = CounterMetricFamily("expertd_requests", "Messages answered.", labels=["op", "code"])
    for (op, code), n in counters.requests.items():
        requests.add_metric([op, code], n)
    yield requests
    durations = HistogramMetricFamily("expertd_request_duration_seconds", "Time to decide on a message.", labels=["op"])
    for op, seen in counters.durations.items():
        durations.add_metric([op], _buckets(seen), seen.sum_s)
    yield durations
    yield _counted("expertd_bad_messages", "Messages that are none.", "reason", counters.bad_messages)
    yield _counted("expertd_peer_rejected", "Peers without a session.", "reason", counters.rejections)


def _of_loads(counters: Counters) -> Iterator[Metric]:
    yield CounterMetricFamily("expertd_load_bytes", "Bytes read when stores were loaded.", value=counters.loaded_nbytes)
    loads = HistogramMetricFamily("expertd_load_duration_seconds", "Time to load a store.")
    loads.add_metric([], _buckets(counters.loads), counters.loads.sum_s)
    yield loads
    yield CounterMetricFamily("expertd_load_failures", "Loads that failed.", value=counters.n_load_failures)


def _counted(name: str, text: str, label: str, counts: dict[str, int]) -> Metric:
    metric = CounterMetricFamily(name, text, labels=[label])
    for word, n in counts.items():
        metric.add_metric([word], n)
    return metric


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Return what Prometheus wants: for each bound, how many were not longer."""
    n, buckets = 0, []
    for bound, count in zip([*map(str, durations.bounds_s), "+Inf"], durations.counts, strict=True):
        n += count
        buckets.append((bound, float(n)))
    return buckets
