"""The daemon's life: one per user, ready when ready, loading while it answers, draining when told."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from protocol import messages as m
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, RequestRefused
from protocol.fdpass import receive_packet_with_fds
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import (
    EXPERTD,
    DaemonProcess,
    background_pid,
    launched_daemon,
    run_expertd,
    running_daemon,
    status_nbytes,
    stop_background_daemon,
)
from tests.support.lease import held_file
from tests.support.stores import EXPERTS_FILE, flip_byte, write_random_store
from tests.support.waiting import WITHIN_S, wait_readable, wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
N_AT_ONCE = 12


def start_at_once(store: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run `expertd start STORE` from many processes at the same moment."""
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        return list(pool.map(lambda _: run_expertd("start", store), range(N_AT_ONCE)))


def log_words(runtime: RuntimeDir, word: str) -> int:
    """Return how many lines of the background log hold that word."""
    return sum(word in line for line in runtime.log.read_text().splitlines())


def test_many_starts_at_once_make_one_daemon_and_one_store(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    results = start_at_once(store)
    pid = background_pid(runtime)
    with ControlClient(runtime) as client:
        stores = client.ask(m.GetStatus(), m.Status).stores
    stop_background_daemon(runtime)

    assert [result.returncode for result in results] == [0] * N_AT_ONCE, [r.stderr for r in results]
    assert all(f"pid {pid}" in result.stderr for result in results)
    assert [(s.digest, s.state) for s in stores] == [(manifest.digest, StoreState.READY)]
    assert log_words(runtime, "store loaded") == 1


def test_many_starts_at_once_over_the_sockets_of_a_killed_daemon(runtime: RuntimeDir, store: Path) -> None:
    with running_daemon(runtime) as dead:
        dead.kill()
    assert runtime.control_socket.exists()

    results = start_at_once(store)
    pid = background_pid(runtime)
    stop_background_daemon(runtime)

    assert [result.returncode for result in results] == [0] * N_AT_ONCE, [r.stderr for r in results]
    assert all(f"pid {pid}" in result.stderr for result in results)
    assert log_words(runtime, "serving") == 1


def test_a_start_while_the_old_daemon_is_ending_gets_a_new_one(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    """The old one holds the lock until it is gone, but no longer answers."""
    with running_daemon(runtime) as old, held_file(store / EXPERTS_FILE) as file:
        with old.client() as client:
            client.ask(m.Load(str(store), manifest.digest), StoreStatus)
            file.wait_for_opener()
            client.ask(m.Stop(), m.Stopping)
        wait_until(lambda: background_pid(runtime) is None, "the old daemon to answer no more")
        with subprocess.Popen([*EXPERTD, "start"], stderr=subprocess.PIPE, text=True) as start:
            wait_until(lambda: runtime.log.exists() and "another expertd" in runtime.log.read_text(), "a busy start")
            file.release()
            _, said = start.communicate(timeout=30)
        pid = background_pid(runtime)
        stop_background_daemon(runtime)

    assert start.returncode == 0, said
    assert pid is not None
    assert pid != old.pid


def test_a_second_daemon_in_the_foreground_is_refused(daemon: DaemonProcess) -> None:
    result = run_expertd("start", "--foreground", timeout_s=20.0)

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "expertd: another expertd of this user is running; see `expertd status`"
    assert daemon.is_alive()
    assert daemon.status().pid == daemon.pid


def test_ready_is_said_when_the_stores_are_in_memory(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    with running_daemon(runtime, str(store)) as daemon:
        status = daemon.store(manifest.digest)

    assert status.state is StoreState.READY


def test_ready_is_not_said_before_and_status_is_answered_meanwhile(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with held_file(store / EXPERTS_FILE) as file, launched_daemon(runtime, str(store)) as (daemon, reader):
        file.wait_for_opener()
        with daemon.client() as client:
            before = client.ask(m.GetStatus(), m.Status).stores[0]
            with pytest.raises(RequestRefused) as refused:
                client.attach(manifest.digest)
        said_early = bool(select.select([reader], [], [], 0)[0])
        file.release()
        wait_readable(reader, "the word that it is ready")
        word = os.read(reader, 1)
        after = daemon.store(manifest.digest)

    assert not said_early
    assert before.state is StoreState.LOADING
    assert refused.value.code == Code.STORE_LOADING
    assert word == b"R"
    assert after.state is StoreState.READY


def test_a_store_that_cannot_be_loaded_ends_the_start_in_the_foreground(store: Path, manifest: Manifest) -> None:
    flip_byte(store / "dense.safetensors", manifest.dense["norm"].offset)

    result = run_expertd("start", "--foreground", store)

    assert result.returncode == 1
    assert "norm: its checksum is wrong" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_sigterm_says_goodbye_and_leaves_the_mappings(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)
    with attach(store, NO_AUTOSTART) as attached, daemon.client() as session:
        expected = bytes(attached.expert_record(ExpertKey(0, 2)))

        code = daemon.terminate()

        data, _ = receive_packet_with_fds(session._sock, MESSAGE_NBYTES_MAX)
        word = decode(data, Channel.CONTROL, Sender.DAEMON)
        with pytest.raises(DaemonUnavailable):
            session.ask(m.GetStatus(), m.Status)
        assert bytes(attached.expert_record(ExpertKey(0, 2))) == expected

    assert (code, word) == (0, m.Draining())
    assert not daemon.directory.control_socket.exists()
    assert not daemon.directory.request_socket.exists()


def test_a_second_sigterm_ends_a_daemon_whose_drain_hangs(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    with running_daemon(runtime) as daemon, held_file(store / EXPERTS_FILE) as file, daemon.client() as client:
        client.ask(m.Load(str(store), manifest.digest), StoreStatus)
        file.wait_for_opener()
        daemon.process.send_signal(signal.SIGTERM)
        data, _ = receive_packet_with_fds(client._sock, MESSAGE_NBYTES_MAX)
        hangs = daemon.is_alive()

        code = daemon.terminate()

    assert decode(data, Channel.CONTROL, Sender.DAEMON) == m.Draining()
    assert hangs
    assert code == 1


def test_an_unused_daemon_ends_after_the_idle_timeout(runtime: RuntimeDir) -> None:
    with running_daemon(runtime, "--idle-timeout", "0.2") as daemon:
        code = daemon.process.wait(timeout=20)

    assert code == 0
    assert "idle, ending" in daemon.log
    assert not runtime.control_socket.exists()


def test_an_attached_runner_keeps_the_daemon_and_its_end_lets_it_go(runtime: RuntimeDir, store: Path) -> None:
    """A second store is held up while it loads: until then the daemon is not idle, however long the attaching takes."""
    other = store.with_name("other")
    write_random_store(other, seed=1)
    stores = (str(store), str(other))
    with (
        held_file(other / EXPERTS_FILE) as file,
        launched_daemon(runtime, "--idle-timeout", "0.2", *stores) as (daemon, reader),
    ):
        file.wait_for_opener()
        with attach(store, NO_AUTOSTART):
            file.release()
            wait_readable(reader, "the second store")
            age_s = daemon.status().age_s
            wait_until(lambda: daemon.status().age_s > age_s + 1.0, "five idle timeouts")
            alive = daemon.is_alive()
        code = daemon.process.wait(timeout=WITHIN_S)

    assert alive
    assert code == 0
    assert "idle, ending" in daemon.log


def test_an_empty_daemon_is_small(daemon: DaemonProcess) -> None:
    daemon.status()

    private_nbytes = daemon.private_nbytes()
    resident_nbytes = status_nbytes(daemon.pid, "VmRSS")

    assert private_nbytes < 60e6
    assert resident_nbytes < 90e6


def test_the_serving_side_imports_nothing_heavy() -> None:
    code = "import sys, expertd.cli, expertd.daemon, expertd.admin; print(*{n.split('.')[0] for n in sys.modules})"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "expertd" in loaded
    assert not {"torch", "numpy", "quant", "transformers", "safetensors"} & set(loaded)


def test_a_loading_store_can_be_unloaded(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    with held_file(store / EXPERTS_FILE) as file, daemon.client() as client:
        client.ask(m.Load(str(store), manifest.digest), StoreStatus)
        file.wait_for_opener()
        client.ask(m.Unload(manifest.digest), m.Unloaded)
        file.release()

        again = client.ask(m.Load(str(store), manifest.digest), StoreStatus)
    wait_until(lambda: daemon.store(manifest.digest).state is StoreState.READY, "the second load")

    assert again.state is StoreState.LOADING


def test_requests_with_a_token_are_answered_and_without_are_counted(daemon: DaemonProcess) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket, daemon.client() as client:
        socket.linger = 0
        socket.connect(daemon.directory.request_endpoint)
        socket.send_multipart([b"x" * 16, encode(m.GetStats(1))])
        socket.send_multipart([client.welcome.token, encode(m.GetStats(2))])
        assert socket.poll(10_000)
        answer = decode(socket.recv(), Channel.REQUEST, Sender.DAEMON)
        n_bad = client.ask(m.GetStatus(), m.Status).n_bad_messages

    assert isinstance(answer, m.Stats)
    assert answer.request_id == 2
    assert n_bad == 1


def test_a_token_of_another_process_is_worth_nothing(daemon: DaemonProcess) -> None:
    code = (
        "import sys, zmq\n"
        "s = zmq.Context().socket(zmq.DEALER)\n"
        "s.connect(sys.argv[1])\n"
        "s.send_multipart([bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])])\n"
        "sys.stdin.read()\n"
        "print(s.poll(0))\n"
        "s.close(0)\n"
    )
    with daemon.client() as client:
        arguments = [daemon.directory.request_endpoint, client.welcome.token.hex(), encode(m.GetStats(1)).hex()]
        with subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as thief:
            wait_until(lambda: client.ask(m.GetStatus(), m.Status).n_bad_messages == 1, "the stray frame")
            answered, _ = thief.communicate("", timeout=20)

    assert answered.strip() == "0"
