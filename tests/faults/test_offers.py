"""What a client offers is proven: forgeries are refused, every descriptor closed, and the daemon goes on."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol import fdpass
from protocol import messages as m
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, RequestRefused
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, StoreState
from protocol.runtime_dir import RuntimeDir
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from protocol.segment import make_segment, map_segment
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.as_user import run_as_nobody
from tests.support.daemon import DaemonProcess, launched_daemon
from tests.support.request_client import RequestClient, file_bytes
from tests.support.stores import dense_damaged
from tests.support.tiers import load_tiered, memory_for
from tests.support.waiting import wait_readable, wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
WITHIN_S = 60.0
N_SLOTS = 4
PINNED = (ExpertKey(1, 2),)


@pytest.fixture
def segments(loaded: DaemonProcess, manifest: Manifest) -> Iterator[list[int]]:
    """The descriptors of a store that the daemon had until now."""
    with loaded.client() as client:
        fds = client.attach(manifest.digest)
    with loaded.client() as client:
        client.ask(m.Unload(manifest.digest), m.Unloaded)
    yield fds
    fdpass.close_all(fds)


def offer(client: ControlClient, store: Path, digest: str, fds: list[int], memory_nbytes: int | None = None) -> None:
    """Offer and wait for the answer; raise RequestRefused."""
    client.offer(m.Offer(str(store), digest, memory_nbytes, len(fds)), fds)
    wait_readable(client.fileno(), "the answer", WITHIN_S)
    client.offer_answer()


def test_true_segments_are_served_from_their_offer_on(
    loaded: DaemonProcess, store: Path, manifest: Manifest, segments: list[int]
) -> None:
    with loaded.client() as client:
        offer(client, store, manifest.digest, segments)
        n_sessions = loaded.store(manifest.digest).n_sessions
    with attach(store, NO_AUTOSTART) as attached:
        n_experts = len([attached.expert_record(key) for key in manifest.experts])

    assert n_sessions == 1
    assert n_experts == len(manifest.experts)


def test_a_forged_byte_an_unsealed_segment_and_a_missing_one_are_refused_and_closed(
    loaded: DaemonProcess, store: Path, manifest: Manifest, segments: list[int]
) -> None:
    data = bytearray(os.pread(segments[2], os.fstat(segments[2]).st_size, 0))
    unsealed = os.memfd_create("expertd-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(unsealed, data)
    data[-100] ^= 1
    forged = make_segment("expertd-store", bytes(data))
    refused = []
    for fds in ([*segments[:2], forged], [*segments[:2], unsealed], segments[:2]):
        with loaded.client() as client, pytest.raises(RequestRefused) as refusal:
            offer(client, store, manifest.digest, fds)
        refused.append(refusal.value.code)
    fdpass.close_all([forged, unsealed])

    assert refused == [Code.STORE_INVALID] * 3
    assert loaded.status().stores == ()
    if os.geteuid() == 0:
        assert not [fd for fd in loaded.fds() if "memfd:expertd-store" in str(fd.readlink())]


def test_an_offer_of_what_is_held_already_is_not_needed(loaded: DaemonProcess, store: Path, manifest: Manifest) -> None:
    with loaded.client() as other:
        fds = other.attach(manifest.digest)
    with loaded.client() as client, pytest.raises(RequestRefused) as refusal:
        offer(client, store, manifest.digest, fds)
    fdpass.close_all(fds)

    assert refusal.value.code == Code.STORE_HELD


def test_descriptors_that_nobody_asked_for_are_closed(loaded: DaemonProcess, segments: list[int]) -> None:
    before = loaded.n_fds() if os.geteuid() == 0 else 0
    with loaded.client() as client:
        for _ in range(50):
            fdpass.send_packet(client._sock, encode(m.GetStatus()), segments)
            data, fds = fdpass.receive_packet_with_fds(client._sock, MESSAGE_NBYTES_MAX)
            answer = decode(data, Channel.CONTROL, Sender.DAEMON)
            fdpass.close_all(fds)

    assert isinstance(answer, m.Status)
    if before:
        wait_until(lambda: loaded.n_fds() == before, "the descriptors to be closed")


@pytest.mark.parametrize("n_sent", [0, 1, 5])
def test_an_offer_with_another_number_of_descriptors_than_it_says_is_a_bad_message(
    loaded: DaemonProcess, store: Path, manifest: Manifest, segments: list[int], n_sent: int
) -> None:
    message = encode(m.Offer(str(store), manifest.digest, None, 3))
    fds = [segments[0]] * n_sent
    with loaded.client() as client:
        fdpass.send_packet(client._sock, message, fds)
        fdpass.send_packet(client._sock, encode(m.GetStatus()))
        data, _ = fdpass.receive_packet_with_fds(client._sock, MESSAGE_NBYTES_MAX)
        answer = decode(data, Channel.CONTROL, Sender.DAEMON)

    assert isinstance(answer, m.Refused)
    assert answer.code == Code.BAD_MESSAGE
    assert loaded.status().stores == ()


def test_a_client_killed_between_the_packets_of_its_offer_leaves_no_descriptor(
    loaded: DaemonProcess, store: Path, manifest: Manifest, segments: list[int]
) -> None:
    before = loaded.n_fds() if os.geteuid() == 0 else 0
    with loaded.client() as client:
        fdpass.send_packet(client._sock, encode(m.Offer(str(store), manifest.digest, None, 200)), segments)
        client._sock.shutdown(socket.SHUT_RDWR)

    wait_until(lambda: loaded.sessions() == 0, "the session to end")
    if before:
        wait_until(lambda: loaded.n_fds() == before, "the descriptors to be closed")
    assert loaded.status().stores == ()


@pytest.mark.usefixtures("as_root")
def test_another_user_can_offer_nothing(loaded: DaemonProcess) -> None:
    path = loaded.directory.control_socket

    refused = run_as_nobody(lambda: fdpass.connect(path, 5.0).close())

    assert refused == DaemonUnavailable.__name__
    assert loaded.is_alive()


@contextmanager
def sealed_part_of_slots(daemon: DaemonProcess, store: Path, manifest: Manifest) -> Iterator[list[int]]:
    """Give the catalogue and the sealed segments of a store that the daemon held in slots, and holds no more."""
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS, pinned=PINNED)
    with daemon.client() as client:
        fds = client.attach(manifest.digest)
    with daemon.client() as client:
        client.ask(m.Unload(manifest.digest), m.Unloaded)
    n_sealed = 2  # dense weights, pinned experts
    fdpass.close_all(fds[1 + n_sealed :])
    try:
        yield fds[: 1 + n_sealed]
    finally:
        fdpass.close_all(fds[: 1 + n_sealed])


def inodes(fds: list[int]) -> set[int]:
    return {os.fstat(fd).st_ino for fd in fds}


def test_the_sealed_part_of_a_store_with_slots_is_taken_and_slots_are_made_beside_it(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """On disk the dense weights are damaged: who reads them refuses the store."""
    with sealed_part_of_slots(daemon, store, manifest) as fds, dense_damaged(store, manifest):
        with daemon.client() as client, pytest.raises(RequestRefused) as answer:
            offer(client, store, manifest.digest, fds, memory_for(manifest, N_SLOTS, PINNED))
        wait_until(lambda: daemon.store(manifest.digest).state is not StoreState.LOADING, "the slots")
        held = daemon.store(manifest.digest)
        with RequestClient(daemon.directory, manifest.digest) as client:
            handle = client.acquire(ExpertKey(0, 0)).handles[0]
            record = client.bytes_of(handle)
            expected = file_bytes(store, client.catalogue, ExpertKey(0, 0))
        with daemon.client() as client:
            served = client.attach(manifest.digest)
        sealed, same = inodes(fds[1:]), inodes(served[1:3])
        fdpass.close_all(served)

    assert answer.value.code == Code.STORE_LOADING
    assert (held.state, held.n_slots, held.n_pinned) == (StoreState.READY, N_SLOTS, len(PINNED))
    assert held.memory_nbytes == memory_for(manifest, N_SLOTS, PINNED)
    assert record == expected
    assert same == sealed


def test_a_forged_byte_of_a_sealed_part_is_refused_and_the_store_is_not_there(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    with sealed_part_of_slots(daemon, store, manifest) as fds:
        data = bytearray(os.pread(fds[1], os.fstat(fds[1]).st_size, 0))
        data[100] ^= 1
        forged = make_segment("expertd-store", bytes(data))
        with daemon.client() as client, pytest.raises(RequestRefused) as answer:
            offer(client, store, manifest.digest, [fds[0], forged, fds[2]])
        fdpass.close_all([forged])

        assert answer.value.code == Code.STORE_INVALID
        assert daemon.status().stores == ()


def test_a_start_with_slots_waits_for_who_maps_the_sealed_part(
    runtime: RuntimeDir, daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """It is this process that maps it. On disk the dense weights are damaged: who reads them refuses the store."""
    memory_nbytes = memory_for(manifest, N_SLOTS)
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    with daemon.client() as client:
        fds = client.attach(manifest.digest)
    view = map_segment(fds[1], os.fstat(fds[1]).st_size)
    daemon.kill()
    with (
        dense_damaged(store, manifest),
        launched_daemon(runtime, str(store), "--memory", str(memory_nbytes)) as (successor, ready),
    ):
        wait_until(lambda: "waiting for offers" in successor.log, "the start to wait")
        with successor.client() as client, pytest.raises(RequestRefused) as answer:
            offer(client, store, manifest.digest, fds[:2], memory_nbytes)
        wait_readable(ready, "the daemon to be ready", WITHIN_S)
        held = successor.store(manifest.digest)
    fdpass.close_all(fds)
    del view

    assert answer.value.code == Code.STORE_LOADING
    assert (held.state, held.n_slots) == (StoreState.READY, N_SLOTS)


def test_all_of_a_store_is_not_taken_where_it_is_to_be_held_in_less_memory(
    runtime: RuntimeDir, loaded: DaemonProcess, store: Path, manifest: Manifest, segments: list[int]
) -> None:
    view = map_segment(segments[1], os.fstat(segments[1]).st_size)
    loaded.kill()
    memory = str(memory_for(manifest, N_SLOTS))
    with launched_daemon(runtime, str(store), "--memory", memory) as (successor, ready):
        wait_until(lambda: "waiting for offers" in successor.log, "the start to wait")
        with successor.client() as client, pytest.raises(RequestRefused) as answer:
            offer(client, store, manifest.digest, segments)
        wait_readable(ready, "the daemon to be ready", WITHIN_S)
        held = successor.store(manifest.digest)
    del view

    assert answer.value.code == Code.STORE_LOADING
    assert (held.state, held.n_slots) == (StoreState.READY, N_SLOTS)
