"""Whoever dies, whenever: the others go on, and nothing of the dead is kept."""

import os
import signal
from pathlib import Path

import pytest

from protocol import fdpass
from protocol import messages as m
from protocol.codec import encode
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Status, StoreState
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.client_process import STEPS, client_at
from tests.support.daemon import (
    DaemonProcess,
    background_pid,
    run_expertd,
    status_nbytes,
    stop_background_daemon,
)
from tests.support.segments import is_held, segments_of_all
from tests.support.stores import EXPERTS_FILE, write_random_store
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
N_TIMES = 3


@pytest.mark.parametrize("step", STEPS)
def test_a_client_killed_at_any_step_gives_everything_back(
    daemon: DaemonProcess, store: Path, manifest: Manifest, step: str
) -> None:
    daemon.load(store, manifest.digest)
    with client_at(step, store) as client:  # the first one may grow buffers that stay
        client.kill()
    wait_until(lambda: daemon.sessions() == 0, "the session to end")
    private_nbytes = daemon.private_nbytes()
    n_fds = daemon.n_fds() if os.geteuid() == 0 else 0

    for _ in range(N_TIMES):
        with client_at(step, store) as client:
            during = daemon.sessions()
            client.kill()
        wait_until(lambda: daemon.sessions() == 0, "the session to end")

        assert during == 1

    if n_fds:
        assert daemon.n_fds() == n_fds
    assert daemon.private_nbytes() - private_nbytes < 1 << 20
    assert daemon.store(manifest.digest).state is StoreState.READY
    assert daemon.store(manifest.digest).n_sessions == 0


def test_an_orphan_goes_with_the_killed_client_that_mapped_it(daemon: DaemonProcess, tmp_path: Path) -> None:
    written = write_random_store(tmp_path / "big", hidden=512, intermediate=1024, n_layers=4, n_experts=12)
    daemon.load(tmp_path / "big", written.digest)

    with client_at("attached", tmp_path / "big") as client:
        with daemon.client() as admin:
            admin.ask(m.Unload(written.digest), m.Unloaded)
        held = segments_of_all(daemon, client.pid)
        client.kill()

    assert sum(held.values()) >= written.experts_nbytes
    wait_until(lambda: daemon.status().stores == (), "the orphan to be forgotten")
    wait_until(lambda: not is_held(daemon, held), "the memory to be free")


def test_the_daemon_is_killed_and_the_runner_reads_on(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)
    data = (store / EXPERTS_FILE).read_bytes()

    with attach(store, NO_AUTOSTART) as attached:
        daemon.kill()
        records = {key: bytes(attached.expert_record(key)) for key in manifest.experts}

    assert records == {key: data[r.offset : r.offset + r.nbytes] for key, r in manifest.experts.items()}


def test_after_a_killed_daemon_the_next_start_just_works(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    daemon.load(store, manifest.digest)
    with attach(store, NO_AUTOSTART) as old:
        daemon.kill()

        result = run_expertd("start", store)
        with attach(store, NO_AUTOSTART) as new:
            same = bytes(old.expert_record(ExpertKey(1, 0))) == bytes(new.expert_record(ExpertKey(1, 0)))
    pid = background_pid(daemon.directory)
    stop_background_daemon(daemon.directory)

    assert result.returncode == 0, result.stderr
    assert f"expertd: started, pid {pid}" in result.stderr
    assert same


def test_a_frozen_client_that_reads_nothing_holds_nobody_up(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """Frozen with its socket full of answers: its replies are dropped, everybody else is served."""
    daemon.load(store, manifest.digest)
    flooder = fdpass.connect(daemon.directory.control_socket, 10.0)
    flooder.settimeout(10.0)
    with flooder, client_at("attached", store) as frozen:
        frozen.send_signal(signal.SIGSTOP)
        fdpass.send_packet(flooder, encode(m.Hello(2, 2, "0.1.0")))
        for _ in range(1000):
            fdpass.send_packet(flooder, encode(m.GetStatus()))

        with attach(store, NO_AUTOSTART) as attached:
            record = bytes(attached.expert_record(ExpertKey(0, 0)))
        status = daemon.status()

    assert record == (store / EXPERTS_FILE).read_bytes()[manifest.experts[ExpertKey(0, 0)].offset :][: len(record)]
    assert frozen.pid in [session.pid for session in status.sessions]
    assert "reply dropped, the client does not read" in daemon.log


def test_a_client_that_takes_no_descriptors_loses_its_session_only(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """Its socket is full when it attaches: a store half handed over cannot be repaired."""
    daemon.load(store, manifest.digest)
    full = fdpass.connect(daemon.directory.control_socket, 10.0)
    with full:
        fdpass.send_packet(full, encode(m.Hello(2, 2, "0.1.0")))
        for _ in range(1000):
            fdpass.send_packet(full, encode(m.GetStatus()))
        wait_until(lambda: "reply dropped" in daemon.log, "a full socket")
        fdpass.send_packet(full, encode(m.Attach(manifest.digest)))

        wait_until(lambda: daemon.sessions() == 0, "the session to be dropped")
        with attach(store, NO_AUTOSTART):
            n_sessions = daemon.store(manifest.digest).n_sessions

    assert n_sessions == 1


def test_many_clients_killed_at_once_leave_the_daemon_as_it_was(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    daemon.load(store, manifest.digest)
    clients = [daemon.client() for _ in range(100)]
    for client in clients:
        for fd in client.attach(manifest.digest):
            os.close(fd)
    attached = daemon.store(manifest.digest).n_sessions
    for client in clients:
        client.close()

    wait_until(lambda: daemon.sessions() == 0, "all sessions to end")

    with daemon.client() as client:
        n_sessions = client.ask(m.GetStatus(), Status).stores[0].n_sessions
    assert (attached, n_sessions) == (100, 0)
    assert status_nbytes(daemon.pid, "RssAnon") < 60e6
