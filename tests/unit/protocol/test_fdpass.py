import os
import socket
from collections.abc import Iterator

import pytest

from protocol import fdpass
from protocol.errors import DaemonUnavailable, MalformedMessage
from protocol.segment import make_segment


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


Pair = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("n_fds", [1, 128, 129, 300])
def test_descriptors_arrive_whole_in_order_and_closed_on_exec(pair: Pair, n_fds: int) -> None:
    left, right = pair
    segments = [make_segment("test", bytes([i % 251])) for i in range(n_fds)]

    fdpass.send_packet(left, b"data", segments)
    data, fds = fdpass.receive_packet_with_fds(right, 64)
    fds = fdpass.receive_more_fds(right, fds, n_fds)

    assert data == b"data"
    assert [os.pread(fd, 1, 0) for fd in fds] == [bytes([i % 251]) for i in range(n_fds)]
    assert not any(os.get_inheritable(fd) for fd in fds)
    fdpass.close_all([*segments, *fds])


def test_fewer_descriptors_than_announced_are_refused_and_closed(pair: Pair) -> None:
    left, right = pair
    segment = make_segment("test", b"x")
    fdpass.send_packet(left, b"data", [segment])
    fdpass.send_packet(left, fdpass.CONTINUATION)
    before = _open_fds()

    data, fds = fdpass.receive_packet_with_fds(right, 64)
    with pytest.raises(MalformedMessage, match="2 descriptors were announced, 1 came"):
        fdpass.receive_more_fds(right, fds, 2)

    assert data == b"data"
    assert _open_fds() == before
    os.close(segment)


def test_unasked_descriptors_never_reach_the_process(pair: Pair) -> None:
    left, right = pair
    segment = make_segment("test", b"x")
    fdpass.send_packet(left, b"data", [segment])
    os.close(segment)
    before = _open_fds()

    data = fdpass.receive_packet(right, 64)

    assert data == b"data"
    assert _open_fds() == before


def test_a_packet_that_is_too_long_is_malformed(pair: Pair) -> None:
    left, right = pair
    left.send(b"x" * 65)

    with pytest.raises(MalformedMessage, match="more than 64 bytes"):
        fdpass.receive_packet(right, 64)


def test_the_end_of_the_peer_is_an_empty_packet(pair: Pair) -> None:
    left, right = pair
    left.close()

    assert fdpass.receive_packet(right, 64) == b""


def test_credentials_are_those_of_the_peer(pair: Pair) -> None:
    assert fdpass.peer_credentials(pair[0]) == fdpass.Credentials(os.getpid(), os.getuid())


def test_no_socket_means_that_no_daemon_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DaemonUnavailable, match="no expertd runs"):
        fdpass.connect(tmp_path_factory.getbasetemp() / "none.sock", 1.0)


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - not files of ours
