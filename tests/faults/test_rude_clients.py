"""Clients that send what nobody should, or too many of them: dropped, and the others are served."""

import array
import os
import resource
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from expertd.log_limits import BURST
from protocol import fdpass
from protocol import messages as m
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, RequestRefused
from protocol.manifest import Manifest
from protocol.messages import Code, Status
from protocol.runtime_dir import RuntimeDir
from protocol.schema import SESSIONS_MAX, Channel, Sender
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.waiting import wait_readable, wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


def connect(daemon: DaemonProcess) -> socket.socket:
    return fdpass.connect(daemon.directory.control_socket, 10.0)


def connect_at_last(daemon: DaemonProcess) -> socket.socket:
    """Connect as soon as there is room among those that wait to be accepted: a busy machine lets them wait."""
    connected: list[socket.socket] = []

    def is_connected() -> bool:
        with suppress(DaemonUnavailable):
            connected.append(connect(daemon))
        return bool(connected)

    wait_until(is_connected, "room for another connection")
    return connected[0]


def is_dropped(sock: socket.socket) -> bool:
    """Whether the daemon has hung up; what it said before is read."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return True


def test_descriptors_that_a_client_sends_are_not_kept(daemon: DaemonProcess) -> None:
    base = daemon.n_fds()
    reader, writer = os.pipe()
    with connect(daemon) as sock:
        fds = array.array("i", [writer] * 100)
        sock.sendmsg([encode(m.Hello(2, 2, "0.1.0"))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        answer = decode(sock.recv(1 << 16), Channel.CONTROL, Sender.DAEMON)

        n_fds = daemon.n_fds()
    os.close(writer)
    wait_readable(reader, "the end of the pipe, which nobody else may hold", 5.0)
    end = os.read(reader, 1)
    os.close(reader)

    assert isinstance(answer, m.Welcome)
    assert n_fds == base + 1
    assert end == b""


def test_a_packet_that_is_too_long_is_a_bad_message(daemon: DaemonProcess) -> None:
    with connect(daemon) as sock:
        for _ in range(3):
            sock.send(b"\x90" * 70_000)

        dropped = is_dropped(sock)

    assert dropped
    assert daemon.status().n_bad_messages == 3


def test_an_empty_packet_ends_the_session_only(daemon: DaemonProcess) -> None:
    with connect(daemon) as sock:
        sock.send(b"")

        dropped = is_dropped(sock)

    assert dropped
    assert daemon.sessions() == 0


def test_who_says_no_hello_is_dropped_however_many_they_are(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """300 silent connections: as many as may be sessions wait for their time to be up, the rest is turned away."""
    silent = [connect_at_last(daemon) for _ in range(300)]
    # The daemon's own clock decides here; at the unit level the time is an input.
    dropped = [is_dropped(sock) for sock in silent]
    for sock in silent:
        sock.close()

    daemon.load(store, manifest.digest)
    with attach(store, NO_AUTOSTART):
        n_sessions = daemon.store(manifest.digest).n_sessions

    assert all(dropped)
    assert n_sessions == 1
    assert BURST <= daemon.log.count("no hello in time") < SESSIONS_MAX


def test_one_session_too_many_is_told_why_and_room_is_made_by_leaving(daemon: DaemonProcess) -> None:
    clients = [daemon.client() for _ in range(SESSIONS_MAX)]
    with pytest.raises(RequestRefused) as refused:
        daemon.client()
    status = clients[0].ask(m.GetStatus(), Status)
    clients.pop().close()
    wait_until(lambda: len(clients[0].ask(m.GetStatus(), Status).sessions) < SESSIONS_MAX, "the end of a session")

    clients.append(daemon.client())
    for client in clients:
        client.close()

    assert refused.value.code == Code.TOO_MANY
    assert len(status.sessions) == SESSIONS_MAX


def test_a_client_whose_hello_was_never_read_is_told_why(daemon: DaemonProcess) -> None:
    """Closing over unread data would reset the connection and take the reason with it."""
    clients = [daemon.client() for _ in range(SESSIONS_MAX)]
    daemon.process.send_signal(signal.SIGSTOP)
    with connect(daemon) as sock:
        fdpass.send_packet(sock, encode(m.Hello(2, 2, "0.1.0")))
        daemon.process.send_signal(signal.SIGCONT)

        answer = decode(sock.recv(1 << 16), Channel.CONTROL, Sender.DAEMON)
    for client in clients:
        client.close()

    assert answer == m.Refused(Code.TOO_MANY, f"{SESSIONS_MAX} sessions are open")


def test_a_daemon_full_of_the_longest_texts_still_answers(daemon: DaemonProcess) -> None:
    sockets = [connect(daemon) for _ in range(SESSIONS_MAX - 1)]
    for sock in sockets:
        fdpass.send_packet(sock, encode(m.Hello(2, 2, "\U0001f600" * 64)))
    for sock in sockets:
        sock.recv(1 << 16)

    n_sessions = len(daemon.status().sessions)
    for sock in sockets:
        sock.close()

    assert n_sessions == SESSIONS_MAX


def test_a_daemon_out_of_descriptors_turns_away_and_serves_afterwards(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    daemon.load(store, manifest.digest)
    n_fds = daemon.n_fds()
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    with ExitStack() as clients, daemon.client() as old:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (n_fds + 4, limits[1]))
        with suppress(DaemonUnavailable):
            for _ in range(100):
                clients.enter_context(daemon.client())
            pytest.fail("100 clients were let in")
        still_served = old.ask(m.GetStatus(), Status)
    n_fds_afterwards = daemon.n_fds()

    with attach(store, NO_AUTOSTART):
        n_sessions = daemon.store(manifest.digest).n_sessions
    assert 1 <= len(still_served.sessions) <= 5
    assert n_fds_afterwards == n_fds
    assert n_sessions == 1
    assert "out of file descriptors" in daemon.log


def test_the_daemon_may_open_as_many_files_as_the_system_allows(runtime: RuntimeDir) -> None:
    """libzmq aborts the process when it cannot accept a connection."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
    try:
        with running_daemon(runtime) as daemon:
            of_daemon = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert of_daemon == (limits[1], limits[1])


def test_stop_from_a_session_without_hello_stops_nothing(daemon: DaemonProcess) -> None:
    with connect(daemon) as sock:
        fdpass.send_packet(sock, encode(m.Stop()))
        answer = sock.recv(1 << 16)

    with ControlClient(daemon.directory) as client:
        pid = client.welcome.pid

    assert b"bad_message" in answer
    assert pid == daemon.pid
