"""What Prometheus reads: names, labels and values; and a server that nobody can hold up."""

import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from expertd.counters import Counters, SlotUse
from expertd.errors import StartFailed
from expertd.host_slots import SessionFigures
from expertd.metrics import DaemonCollector, Figures, MetricsServer
from protocol import messages as m
from protocol.messages import SessionStatus, Status
from tests.unit.expertd.test_show import READY

TIERED = replace(
    READY, digest="ef" * 32, nbytes=10**9, n_corrupt=0, corrupt=(), memory_nbytes=10**9, n_slots=64,
    n_used_slots=60, n_loads=300, read_nbytes=9_000_000_000,
)  # fmt: skip
PROMISED = {
    "expertd_build_info", "expertd_sessions", "expertd_memory_bytes", "expertd_open_fds", "expertd_segments",
    "expertd_store_bytes", "expertd_requests", "expertd_request_duration_seconds", "expertd_bad_messages",
    "expertd_peer_rejected", "expertd_load_bytes", "expertd_load_duration_seconds", "expertd_checksum_failures",
    "expertd_prefetch", "expertd_lease_held", "expertd_lease_expired",
}  # fmt: skip


def figures() -> Figures:
    counters = Counters()
    counters.request(m.GetStatus(), None, 0.002)
    counters.request(m.GetStatus(), None, 20.0)
    counters.load(4_000_000_000, 2.0)
    counters.bad_messages["stray"] += 3
    counters.rejections["version"] += 1
    session = SessionStatus(1234, "0.1.0", 65.0, TIERED.digest, n_leases=2)
    status = Status(77, "0.1.0", 3725.0, 30_000_000, 4_000_000_000, 9_000_000_000, 3, (READY, TIERED), (session,))
    use = SlotUse()
    use.add(SessionFigures(2, n_hits=30, n_misses=10, n_hints_used=5, n_hints_late=4, n_hints_wasted=3, waited_s=1.5))
    return Figures(status, counters, use, n_segments=5, huge_nbytes=1 << 30, leases_lost={TIERED.digest: 7})


def samples() -> dict[str, float]:
    """Return what is exposed, by name and labels as Prometheus writes them."""
    registry = CollectorRegistry()
    registry.register(DaemonCollector(figures))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        sample.name + "".join(f"[{key}={value}]" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_figures_stand_under_their_names_and_labels() -> None:
    found = samples()

    assert found["expertd_build_info[protocol=2][version=0.1.0]"] == 1
    assert found["expertd_store_bytes[state=ready]"] == 4e9 + 1e9
    assert found["expertd_store_bytes[state=orphaned]"] == 0
    assert found["expertd_segments"] == 5
    assert found["expertd_requests_total[code=ok][op=get_status]"] == 2
    assert found["expertd_bad_messages_total[reason=stray]"] == 3
    assert found["expertd_peer_rejected_total[reason=version]"] == 1
    assert found["expertd_load_bytes_total"] == 4e9
    assert found[f"expertd_checksum_failures_total[store={READY.digest[:12]}][when=load]"] == 1


def test_slots_leases_and_prefetches_are_told_where_there_are_any() -> None:
    found = samples()

    assert found["expertd_slots[state=used][store=efefefefefef]"] == 60
    assert found["expertd_slots[state=free][store=efefefefefef]"] == 4
    assert found["expertd_slot_loads_total[store=efefefefefef]"] == 300
    assert found["expertd_slot_load_bytes_total[store=efefefefefef]"] == 9e9
    assert found["expertd_lease_expired_total[store=efefefefefef]"] == 7
    assert found["expertd_lease_held"] == 2
    assert (found["expertd_slot_hits_total"], found["expertd_slot_misses_total"]) == (30, 10)
    assert found["expertd_waited_seconds_total"] == 1.5
    assert [found[f"expertd_prefetch_total[outcome={word}]"] for word in ("used", "late", "wasted", "dropped")] == [
        5,
        4,
        3,
        0,
    ]
    assert not any(READY.digest[:12] in name for name in found if "slot" in name)


def test_a_histogram_counts_upwards_to_everything() -> None:
    found = samples()

    name = "expertd_request_duration_seconds"
    assert found[f"{name}_bucket[le=0.001][op=get_status]"] == 0
    assert found[f"{name}_bucket[le=0.003][op=get_status]"] == 1
    assert found[f"{name}_bucket[le=10.0][op=get_status]"] == 1
    assert found[f"{name}_bucket[le=+Inf][op=get_status]"] == found[f"{name}_count[op=get_status]"] == 2
    assert found[f"{name}_sum[op=get_status]"] == pytest.approx(20.002)


def test_every_name_that_is_promised_is_there_and_no_label_names_an_expert() -> None:
    families = list(DaemonCollector(figures).collect())

    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert {family.name for family in families} >= PROMISED
    assert labels == {"version", "protocol", "kind", "state", "op", "code", "reason", "when", "le", "store", "outcome"}


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with MetricsServer(("127.0.0.1", 0), figures) as serving:
        yield serving


def connected(server: MetricsServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=10)


def test_it_is_scraped_over_http(server: MetricsServer) -> None:
    host, port = server.address

    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()

    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "expertd_sessions 1.0" in text
    assert "process_cpu_seconds_total" in text


def test_a_fifth_connection_is_hung_up_on_and_room_comes_back(server: MetricsServer) -> None:
    silent = [connected(server) for _ in range(4)]
    with connected(server) as fifth:
        refused = fifth.recv(1)
    for sock in silent:
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""  # it has seen the end
        sock.close()

    with connected(server) as sixth:
        sixth.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = sixth.recv(16)

    assert refused == b""
    assert answer.startswith(b"HTTP/1.0 200")


def test_an_address_in_use_is_named(server: MetricsServer) -> None:
    host, port = server.address

    with pytest.raises(StartFailed, match=rf"metrics: .*{port}.* cannot be listened at \(Address already in use\)"):
        MetricsServer((host, port), figures)


def test_a_socket_whose_folder_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"metrics: .*none/metrics\.sock cannot be listened at"):
        MetricsServer(tmp_path / "none" / "metrics.sock", figures)
