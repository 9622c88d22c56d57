"""A store larger than memory: daemon and runners killed and frozen while experts are read, granted and used."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol import messages as m
from protocol.errors import DaemonSilent
from protocol.fault_points import FaultPoint
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import DaemonProcess, running_daemon, with_fault
from tests.support.frozen import settled_fds, thaw, wait_until_frozen
from tests.support.request_client import RequestClient, file_bytes
from tests.support.segments import segments_of
from tests.support.small_stores import make_small_store
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

N_SLOTS = 4
A, B = ExpertKey(0, 0), ExpertKey(0, 1)
# At the second expert: the first one is granted and lies in its slot.
DAEMON_STEPS = (
    (FaultPoint.DAEMON_SLOT_READING, 2),
    (FaultPoint.DAEMON_SLOT_FILLED, 2),
    (FaultPoint.DAEMON_REQUEST_RECEIVED, 2),
    (FaultPoint.DAEMON_REQUEST_ANSWERED, 2),
)
RUNNER_STEPS = (
    FaultPoint.RUNNER_EXPERTS_DEMANDED,
    FaultPoint.RUNNER_EXPERTS_GRANTED,
    FaultPoint.RUNNER_SLOTS_COMPUTED,
    FaultPoint.RUNNER_EXPERTS_RELEASED,
    FaultPoint.RUNNER_TOKEN_CHOSEN,
)
PASSAGE = 5  # in the middle of a text
LEASE_LOST_WITHIN_S = 40.0


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 32 experts whose model ends no text early."""
    files = {"generation_config.json": b'{"eos_token_id": 99999}'}
    return make_small_store(tmp_path_factory.mktemp("slots"), files=files, vocab=258, n_layers=4, n_experts=8).path


@pytest.mark.parametrize(("point", "nth"), DAEMON_STEPS)
def test_what_a_killed_daemon_was_reading_is_never_taken_for_an_expert(
    runtime: RuntimeDir, store: Path, manifest: Manifest, point: FaultPoint, nth: int
) -> None:
    with running_daemon(runtime, fault=f"{point}=stop@{nth}") as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as client:
            handle = client.acquire(A).handles[0]
            client.send_acquire(B)
            wait_until_frozen(daemon.pid)
            held = segments_of(daemon.pid)
            daemon.kill()

            there, is_open = client.table.present(), client.control.is_open()
            contents = {key: client.bytes_of(handle) for key in there if key == A}
            expected = file_bytes(store, client.catalogue, A)

    with running_daemon(runtime) as successor:
        load_tiered(successor, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as client:
            handles = client.acquire(A, B).handles
            again = {handle.key: client.bytes_of(handle) for handle in handles}
            same = again == {key: file_bytes(store, client.catalogue, key) for key in (A, B)}
        is_free = not segments_of(successor.pid).keys() & held.keys()

    assert not is_open
    assert A in there
    assert (B in there) <= (point is not FaultPoint.DAEMON_SLOT_READING)
    assert contents == {A: expected}
    assert same
    assert is_free


@pytest.mark.parametrize(("point", "nth"), DAEMON_STEPS)
def test_a_daemon_frozen_while_it_serves_slots_goes_on_where_it_was(
    runtime: RuntimeDir, store: Path, manifest: Manifest, point: FaultPoint, nth: int
) -> None:
    with running_daemon(runtime, fault=f"{point}=stop@{nth}") as daemon:
        load_tiered(daemon, store, manifest, n_slots=N_SLOTS)
        with RequestClient(runtime, manifest.digest) as client:
            first = client.acquire(A).handles[0]
            request_id = client.send_acquire(B)
            wait_until_frozen(daemon.pid)
            record = client.bytes_of(first)
            with pytest.raises(DaemonSilent):
                daemon.client(timeout_s=0.3)
            thaw(daemon.pid)

            second = client.granted(request_id).handles[0]

            assert record == file_bytes(store, client.catalogue, A)
            assert client.bytes_of(second) == file_bytes(store, client.catalogue, B)
            assert client.stats().n_leases == 2
        wait_until(lambda: daemon.sessions() == 0, "the sessions to end")
        assert daemon.store(manifest.digest).n_used_slots == 2
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("point", RUNNER_STEPS)
def test_a_runner_killed_with_leases_gives_them_back(
    daemon: DaemonProcess, text_store: Path, point: FaultPoint
) -> None:
    """As few slots as there may be: a lease that stayed would be missed at once."""
    manifest = read_manifest(text_store)
    load_tiered(daemon, text_store, manifest, n_slots=N_SLOTS)
    fds = settled_fds(daemon)

    code = subprocess.run(crowd_command(text_store), env=with_fault(f"{point}=kill@{PASSAGE}"), check=False).returncode
    wait_until(lambda: daemon.sessions() == 0, "the dead one's session to end")
    with RequestClient(daemon.directory, manifest.digest) as client:
        granted = client.acquire(*list(manifest.experts)[:N_SLOTS])

    assert code == -9
    assert len(granted.handles) == N_SLOTS
    wait_until(lambda: daemon.sessions() == 0, "the client's session to end")
    assert settled_fds(daemon) == fds


def test_a_frozen_runner_loses_its_leases_and_no_token(daemon: DaemonProcess, text_store: Path) -> None:
    """It holds slots that others need; when it goes on, what it computed from them is thrown away."""
    manifest = read_manifest(text_store)
    expected = resident_texts(daemon, text_store)
    load_tiered(daemon, text_store, manifest, n_slots=N_SLOTS)
    with subprocess.Popen(
        crowd_command(text_store),
        env=with_fault(f"{FaultPoint.RUNNER_SLOTS_COMPUTED}=stop@{PASSAGE}"),
        stdout=subprocess.PIPE,
    ) as frozen:
        wait_until_frozen(frozen.pid)
        with RequestClient(daemon.directory, manifest.digest, timeout_s=LEASE_LOST_WITHIN_S) as client:
            # One after the other through all slots: those of the frozen one are among them.
            for key in manifest.experts:
                handle = client.acquire(key).handles[0]
                assert client.bytes_of(handle) == file_bytes(text_store, client.catalogue, key)
                client.release(key)
            granted = client.acquire(*list(manifest.experts)[:N_SLOTS])
        thaw(frozen.pid)
        said, _ = frozen.communicate(timeout=60)

    assert len(granted.handles) == N_SLOTS
    assert frozen.returncode == 0
    assert said == expected
    wait_until(lambda: daemon.sessions() == 0, "its session to end")


@pytest.mark.slow
def test_a_runner_waits_for_a_frozen_daemon_so_long_and_says_so(daemon: DaemonProcess, text_store: Path) -> None:
    """It is frozen for good while the runner waits for an expert."""
    manifest = read_manifest(text_store)
    load_tiered(daemon, text_store, manifest, n_slots=N_SLOTS)
    with subprocess.Popen(
        crowd_command(text_store),
        env=with_fault(f"{FaultPoint.RUNNER_EXPERTS_DEMANDED}=stop@{PASSAGE}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as runner:
        wait_until_frozen(runner.pid)
        os.kill(daemon.pid, signal.SIGSTOP)
        thaw(runner.pid)
        _, said = runner.communicate(timeout=90)
        thaw(daemon.pid)

    assert runner.returncode == 1
    assert "has not answered" in said.decode().splitlines()[-1]
    wait_until(lambda: daemon.sessions() == 0, "its session to end")
    with RequestClient(daemon.directory, manifest.digest) as client:
        assert len(client.acquire(*list(manifest.experts)[:N_SLOTS]).handles) == N_SLOTS


def crowd_command(store: Path) -> list[str]:
    """A runner that writes every prompt's text."""
    return [sys.executable, "-m", "tests.support.crowd", "alone", str(store)]


def texts_of(store: Path) -> bytes:
    """Return what such a runner writes when nobody disturbs it."""
    return subprocess.run(crowd_command(store), capture_output=True, check=True).stdout


def resident_texts(daemon: DaemonProcess, store: Path) -> bytes:
    """Return the same of a store that is all in memory, which it is not any more afterwards."""
    digest = read_manifest(store).digest
    daemon.load(store, digest)
    texts = texts_of(store)
    with daemon.client() as client:
        client.ask(m.Unload(digest), m.Unloaded)
    return texts
