"""A store larger than its memory, asked by raw clients: what they are granted is what the files hold, read once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, Granted, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.page_cache import cached_nbytes, drop_cached
from tests.support.request_client import RequestClient, file_bytes
from tests.support.segments import is_held, segments_of_all
from tests.support.stores import EXPERTS_FILE, flip_byte
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

A, B, C, D, E = (ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(0, 3), ExpertKey(1, 0))


@pytest.fixture
def held(daemon: DaemonProcess, store: Path, manifest: Manifest) -> StoreStatus:
    """The store of eight experts with four slots."""
    return load_tiered(daemon, store, manifest, n_slots=4)


@pytest.fixture
def client(runtime: RuntimeDir, held: StoreStatus) -> Iterator[RequestClient]:
    with RequestClient(runtime, held.digest) as attached:
        yield attached


@pytest.fixture
def other(runtime: RuntimeDir, held: StoreStatus) -> Iterator[RequestClient]:
    with RequestClient(runtime, held.digest) as attached:
        yield attached


def test_a_granted_expert_is_what_the_file_holds(client: RequestClient, store: Path) -> None:
    granted = client.acquire(A, E)

    assert {handle.key for handle in granted.handles} == {A, E}
    for handle in granted.handles:
        assert client.bytes_of(handle) == file_bytes(store, client.catalogue, handle.key)
        assert handle.generation == 2


def test_the_table_tells_what_is_in_memory_without_a_message(client: RequestClient, other: RequestClient) -> None:
    handle = client.acquire(A).handles[0]

    entry = other.table.present()[A]

    assert other.catalogue.slots is not None
    assert (entry.slot, entry.generation) == (other.catalogue.slots.slot_of(handle), 2)
    assert other.table.still_holds(A, entry)


def test_an_expert_that_two_sessions_want_is_read_once(
    client: RequestClient, other: RequestClient, daemon: DaemonProcess, manifest: Manifest
) -> None:
    mine, theirs = client.send_acquire(A, B), other.send_acquire(B, A)
    for asker, request_id in ((client, mine), (other, theirs)):
        while asker.granted(request_id).n_awaited:
            pass

    held = daemon.store(manifest.digest)

    assert (held.n_loads, held.n_used_slots) == (2, 2)
    assert held.read_nbytes == 2 * held.slot_nbytes


def test_a_slot_that_is_filled_anew_has_another_generation(client: RequestClient, store: Path) -> None:
    first = client.acquire(A).handles[0]
    entry = client.table.present()[A]
    client.release(A)

    client.acquire(B, C, D, E)

    assert A not in client.table.present()
    assert not client.table.still_holds(A, entry)
    client.release(B, C, D, E)
    again = client.acquire(A).handles[0]
    assert again.generation > first.generation
    assert client.bytes_of(again) == file_bytes(store, client.catalogue, A)


def test_what_is_leased_stays_while_others_ask(client: RequestClient, other: RequestClient) -> None:
    client.acquire(A, B, C)

    for key in (D, E, ExpertKey(1, 1), ExpertKey(1, 2)):
        other.acquire(key)
        other.release(key)

    assert {A, B, C} <= client.table.present().keys()


def test_the_end_of_a_session_frees_its_leases(
    client: RequestClient, runtime: RuntimeDir, manifest: Manifest, daemon: DaemonProcess
) -> None:
    with RequestClient(runtime, manifest.digest) as leaving:
        leaving.acquire(A, B, C, D)
        request_id = client.send_acquire(E)

    granted = client.granted(request_id)

    assert [handle.key for handle in granted.handles] == [E]
    wait_until(lambda: [s.n_leases for s in daemon.status().sessions if s.digest] == [1], "the leases to be counted")


def test_asking_again_for_what_one_holds_is_answered_again(client: RequestClient) -> None:
    first = client.acquire(A)

    second = client.acquire(A)

    assert second.handles == first.handles
    assert client.stats().n_leases == 1


def test_a_corrupt_expert_is_refused_and_the_others_are_served(
    daemon: DaemonProcess, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    flip_byte(store / EXPERTS_FILE, manifest.experts[B].offset + 700)
    held = load_tiered(daemon, store, manifest, n_slots=4)

    with RequestClient(runtime, held.digest) as client:
        granted = client.acquire(A, B, C)

        assert {handle.key for handle in granted.handles} == {A, C}
        assert [(refusal.key, refusal.reason.code) for refusal in granted.refusals] == [(B, Code.CORRUPT)]
    after = daemon.store(manifest.digest)
    assert (after.n_corrupt, after.corrupt, after.n_used_slots) == (1, (B,), 2)


def test_a_file_that_was_cut_is_a_read_error_of_its_experts(
    client: RequestClient, store: Path, manifest: Manifest
) -> None:
    with (store / EXPERTS_FILE).open("r+b") as file:
        file.truncate(manifest.experts[E].offset + 4096)

    granted = client.acquire(D, E)

    assert [handle.key for handle in granted.handles] == [D]
    assert [(refusal.key, refusal.reason.code) for refusal in granted.refusals] == [(E, Code.READ_FAILED)]


def test_a_read_that_failed_may_be_asked_again(client: RequestClient, store: Path, manifest: Manifest) -> None:
    whole = (store / EXPERTS_FILE).read_bytes()
    with (store / EXPERTS_FILE).open("r+b") as file:
        file.truncate(manifest.experts[E].offset + 4096)
    client.acquire(E)
    with (store / EXPERTS_FILE).open("r+b") as file:
        file.write(whole)

    granted = client.acquire(E)

    assert client.bytes_of(granted.handles[0]) == file_bytes(store, client.catalogue, E)


def test_a_file_that_was_replaced_is_not_what_is_read(client: RequestClient, store: Path, manifest: Manifest) -> None:
    original = file_bytes(store, client.catalogue, A)
    (store / EXPERTS_FILE).rename(store / "old")
    (store / EXPERTS_FILE).write_bytes(bytes(manifest.experts_nbytes))

    granted = client.acquire(A)

    assert client.bytes_of(granted.handles[0]) == original


def test_what_is_not_in_the_store_is_refused_as_a_whole(client: RequestClient) -> None:
    reply = client.ask(m.Acquire(7, (A, ExpertKey(9, 9))))

    assert isinstance(reply, m.RequestRefusal)
    assert (reply.request_id, reply.reason.code) == (7, Code.UNKNOWN_EXPERT)


def test_a_pinned_expert_is_granted_as_it_lies_in_the_catalogue(
    daemon: DaemonProcess, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    held = load_tiered(daemon, store, manifest, n_slots=5, pinned=(B,))

    with RequestClient(runtime, held.digest) as client:
        alone, beside = client.acquire(B), client.acquire(A, B)

        assert alone.handles == (client.catalogue.experts[B],)
        assert client.bytes_of(alone.handles[0]) == file_bytes(store, client.catalogue, B)
        assert {handle.key for handle in beside.handles} == {A, B}
    assert (held.n_pinned, held.n_slots) == (1, 5)


def test_a_foreseen_expert_is_there_when_it_is_needed(client: RequestClient) -> None:
    client.prefetch([A])
    wait_until(lambda: A in client.table.present(), "the hint to be read")

    granted = client.acquire(A)

    stats = client.stats()
    assert [handle.key for handle in granted.handles] == [A]
    assert (stats.n_hits, stats.n_misses, stats.n_prefetch_used) == (1, 0, 1)


def test_what_was_read_without_a_message_is_told_by_release(client: RequestClient, other: RequestClient) -> None:
    other.acquire(A)

    client.release(A)

    assert (client.stats().n_hits, client.stats().n_misses) == (1, 0)


def test_a_store_with_slots_stays_at_work_while_it_is_unloaded_and_mapped(
    client: RequestClient, daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    with daemon.client() as admin:
        admin.ask(m.Unload(manifest.digest), m.Unloaded)

    granted = client.acquire(A)

    assert client.bytes_of(granted.handles[0]) == file_bytes(store, client.catalogue, A)


def test_a_budget_below_the_least_is_refused_with_the_least(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    with daemon.client() as admin:
        admin.ask(m.Load(str(store), manifest.digest, manifest.dense_nbytes), StoreStatus)
    wait_until(lambda: daemon.store(manifest.digest).error is not None, "the load to fail")

    error = daemon.store(manifest.digest).error

    assert error is not None
    assert error.code is Code.OUT_OF_MEMORY
    assert "needs at least" in error.detail


def test_a_store_that_fits_its_budget_is_resident(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    with daemon.client() as admin:
        admin.ask(m.Load(str(store), manifest.digest, 1 << 30), StoreStatus)
    wait_until(lambda: daemon.store(manifest.digest).state is StoreState.READY, "the store to be loaded")

    held = daemon.store(manifest.digest)

    nbytes = manifest.dense_nbytes + manifest.experts_nbytes
    assert (held.n_slots, held.memory_nbytes, held.nbytes) == (0, 1 << 30, nbytes)


def test_the_budget_is_kept_and_said(held: StoreStatus, daemon: DaemonProcess) -> None:
    assert held.memory_nbytes is not None
    assert held.nbytes <= held.memory_nbytes < held.nbytes + held.slot_nbytes
    assert (held.n_slots, held.n_loads, held.n_used_slots) == (4, 0, 0)
    assert daemon.status().shared_nbytes == held.nbytes


def test_more_than_all_slots_can_be_asked_for_at_once(client: RequestClient, manifest: Manifest) -> None:
    def give_back(answer: Granted) -> None:
        client.release(*(handle.key for handle in answer.handles))

    granted = client.acquire(*manifest.experts, after_each=give_back)

    assert sorted(handle.key for handle in granted.handles) == sorted(manifest.experts)


def test_a_frozen_sessions_lease_goes_to_who_needs_it_and_its_late_look_sees_that(
    client: RequestClient, other: RequestClient, store: Path
) -> None:
    handle = client.acquire(A, B, C, D).handles[0]
    entry = client.table.present()[handle.key]  # and then no word more: it stands still

    granted = other.acquire(E)

    assert other.bytes_of(granted.handles[0]) == file_bytes(store, other.catalogue, E)
    taken = [key for key in (A, B, C, D) if key not in other.table.present()]
    assert len(taken) == 1
    assert client.table.still_holds(handle.key, entry) == (handle.key not in taken)
    assert client.stats().n_leases == 3


def test_memory_is_what_the_budget_says_when_every_slot_was_filled(
    client: RequestClient, held: StoreStatus, daemon: DaemonProcess, manifest: Manifest
) -> None:
    for key in manifest.experts:
        client.acquire(key)
        client.release(key)

    in_segments = sum(segments_of_all(daemon, os.getpid()).values())

    assert held.memory_nbytes is not None
    catalogue_nbytes = 64 << 10  # the catalogue has a segment of its own, as in a resident store
    assert held.nbytes <= in_segments <= held.memory_nbytes + catalogue_nbytes
    assert daemon.store(manifest.digest).n_used_slots == held.n_slots


def test_no_second_copy_of_what_was_read_stays_in_the_page_cache(
    client: RequestClient, store: Path, manifest: Manifest
) -> None:
    drop_cached(store / EXPERTS_FILE)

    for key in manifest.experts:
        client.acquire(key)
        client.release(key)

    assert cached_nbytes(store / EXPERTS_FILE) <= manifest.experts[A].nbytes


def test_what_is_unloaded_while_it_is_being_read_leaves_nothing(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    config = store.parent / "slow.toml"
    config.write_text('read_limit = "10kB/s"\n')
    with running_daemon(runtime, "--config", str(config)) as daemon:
        load_tiered(daemon, store, manifest, n_slots=4)
        n_fds = daemon.n_fds() if os.geteuid() == 0 else 0
        with RequestClient(runtime, manifest.digest) as leaving:
            leaving.send_acquire(A, B)
            wait_until(lambda: daemon.store(manifest.digest).n_used_slots == 2, "the reads to begin")
            with daemon.client() as admin:
                admin.ask(m.Unload(manifest.digest), m.Unloaded)

        wait_until(lambda: not daemon.status().stores, "the orphan to go")

        if n_fds:
            wait_until(lambda: daemon.n_fds() < n_fds, "the store's files to be closed")
            assert not is_held(daemon, segments_of_all(daemon))
        assert daemon.terminate() == 0
