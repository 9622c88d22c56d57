"""The disk: reads that fail, files that are cut, replaced, overwritten or slow, under a daemon that goes on serving."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol import messages as m
from protocol.fault_points import FaultPoint
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import DaemonProcess, run_expertd, running_daemon
from tests.support.frozen import settled_fds, thaw, wait_until_frozen
from tests.support.request_client import RequestClient, file_bytes
from tests.support.segments import segments_of
from tests.support.stores import EXPERTS_FILE, flip_byte
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
N_SLOTS = 4
N_DENSE = 2  # records of the store that are read before the experts
A, B = ExpertKey(0, 0), ExpertKey(0, 1)


def served(store: Path, manifest: Manifest, data: bytes) -> set[ExpertKey]:
    """Return the experts that a runner gets, and gets right."""
    with attach(store, NO_AUTOSTART) as attached:
        corrupt = set(manifest.experts) - attached._catalogue.experts.keys()
        return {
            key
            for key, record in manifest.experts.items()
            if key not in corrupt and attached.expert_record(key) == data[record.offset : record.offset + record.nbytes]
        }


def test_a_read_error_while_a_store_is_loaded_costs_that_expert(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_RECORD_READING}=fail@{N_DENSE + 3}") as daemon:
        status = daemon.load(store, manifest.digest)
        good = served(store, manifest, (store / EXPERTS_FILE).read_bytes())

        log = daemon.log

    assert (status.state, status.n_corrupt) == (StoreState.READY, 1)
    assert good == set(manifest.experts) - set(status.corrupt)
    assert f"key={status.corrupt[0]} damage=it cannot be read (fault point daemon-record-reading)" in log


def test_a_disk_that_reads_nothing_is_said_and_leaves_nothing(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_RECORD_READING}=fail@1+") as daemon:
        fds = settled_fds(daemon)
        status = daemon.load(store, manifest.digest)
        result = run_expertd("load", store)

        assert settled_fds(daemon) == fds
        assert segments_of(daemon.pid) == {}
    assert status.error is not None
    assert status.error.code is Code.STORE_INVALID
    assert "it cannot be read (fault point daemon-record-reading), and nothing works without it" in status.error.detail
    assert result.returncode == 1
    assert "it cannot be read" in result.stderr.splitlines()[-1]


@contextmanager
def load_held_at_open_files(runtime: RuntimeDir, store: Path, manifest: Manifest) -> Iterator[DaemonProcess]:
    """Give a daemon that has opened a store's files and is frozen before it reads them; it is thawed behind."""
    fault = f"{FaultPoint.DAEMON_FILES_OPENED}=stop"
    with running_daemon(runtime, fault=fault) as daemon, daemon.client() as client:
        client.ask(m.Load(str(store), manifest.digest), StoreStatus)
        wait_until_frozen(daemon.pid)
        try:
            yield daemon
        finally:
            thaw(daemon.pid)


def test_a_file_cut_while_it_is_loaded_costs_the_experts_behind_the_cut(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    data = (store / EXPERTS_FILE).read_bytes()
    cut = manifest.experts[ExpertKey(1, 1)].offset + 100
    with load_held_at_open_files(runtime, store, manifest) as daemon:
        os.truncate(store / EXPERTS_FILE, cut)
        thaw(daemon.pid)
        wait_until(lambda: daemon.store(manifest.digest).state is StoreState.READY, "the store to be loaded")
        status = daemon.store(manifest.digest)
        good = served(store, manifest, data)
        log = daemon.log

    behind = {key for key, record in manifest.experts.items() if record.offset + record.nbytes > cut}
    assert set(status.corrupt) == behind
    assert good == set(manifest.experts) - behind
    assert f"it cannot be read (the file ends at byte {cut}" in log


def test_a_file_replaced_while_it_is_loaded_is_not_what_is_read(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    data = (store / EXPERTS_FILE).read_bytes()
    with load_held_at_open_files(runtime, store, manifest) as daemon:
        (store / EXPERTS_FILE).rename(store / "old")
        (store / EXPERTS_FILE).write_bytes(bytes(len(data)))
        thaw(daemon.pid)
        wait_until(lambda: daemon.store(manifest.digest).state is StoreState.READY, "the store to be loaded")
        good = served(store, manifest, data)

    assert good == set(manifest.experts)


def test_a_resident_store_does_not_care_what_becomes_of_its_files(
    loaded: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """Cut to nothing, under mappings: a mapped file would be SIGBUS."""
    data = (store / EXPERTS_FILE).read_bytes()
    with attach(store, NO_AUTOSTART) as attached:
        os.truncate(store / EXPERTS_FILE, 0)

        records = {key: bytes(attached.expert_record(key)) for key in manifest.experts}

    assert loaded.is_alive()
    assert records == {key: data[r.offset : r.offset + r.nbytes] for key, r in manifest.experts.items()}


def test_a_read_error_of_a_slot_is_refused_and_may_be_asked_again(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_SLOT_READING}=fail@2") as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as client:
            first, failed, again = client.acquire(A), client.acquire(B), client.acquire(B)

            assert [handle.key for handle in first.handles] == [A]
            assert failed.handles == ()
            assert [(refusal.key, refusal.reason.code) for refusal in failed.refusals] == [(B, Code.READ_FAILED)]
            assert client.bytes_of(again.handles[0]) == file_bytes(store, client.catalogue, B)
            assert client.stats().n_leases == 2
        assert f"expert not read key={B} outcome=failed" in daemon.log
        assert daemon.store(manifest.digest).n_corrupt == 0


def test_a_disk_that_fails_for_good_costs_no_slot(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_SLOT_READING}=fail@2+") as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as client:
            client.acquire(A)
            answers = [client.acquire(*list(manifest.experts)[1:]) for _ in range(3)]

            assert all(answer.handles == () for answer in answers)
            assert all(len(answer.refusals) == len(manifest.experts) - 1 for answer in answers)
            assert client.table.present().keys() == {A}
        held = daemon.store(manifest.digest)
        assert (held.n_used_slots, held.n_loads) == (1, 1)


def test_a_bit_that_flips_on_disk_between_two_reads_of_an_expert_is_found_at_the_second(
    daemon: DaemonProcess, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
    with RequestClient(runtime, manifest.digest) as client:
        whole = client.acquire(A)
        client.release(A)
        flip_byte(store / EXPERTS_FILE, manifest.experts[A].offset + 999)
        for key in list(manifest.experts)[1 : N_SLOTS + 1]:  # so many that it has to go
            client.acquire(key)
            client.release(key)
        damaged, beside = client.acquire(A), client.acquire(B)

    assert [handle.key for handle in whole.handles] == [A]
    assert [(refusal.key, refusal.reason.code) for refusal in damaged.refusals] == [(A, Code.CORRUPT)]
    assert [handle.key for handle in beside.handles] == [B]
    assert daemon.store(manifest.digest).corrupt == (A,)


def test_a_slow_disk_holds_up_only_who_waits_for_it(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    """So slow that a record takes half a second: who asks for what is there is answered meanwhile."""
    nbytes = manifest.experts[A].nbytes
    config = runtime.path.parent / "slow.toml"
    config.write_text(f'read_limit = "{2 * nbytes}B/s"\n')
    with running_daemon(runtime, "--config", str(config)) as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as slow, RequestClient(runtime, manifest.digest) as quick:
            quick.acquire(A)
            awaited = slow.send_acquire(B)
            meanwhile = [quick.acquire(A) for _ in range(20)]
            was_early = bool(slow.socket.poll(0))
            status = daemon.status()
            granted = slow.granted(awaited)

            assert all(answer.handles[0].key == A for answer in meanwhile)
            assert not was_early
            assert status.stores[0].n_loads == 1
            assert slow.bytes_of(granted.handles[0]) == file_bytes(store, slow.catalogue, B)
            assert slow.stats().waited_s > 0.1
