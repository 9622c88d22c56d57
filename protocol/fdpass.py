"""Packets and file descriptors over a Unix SEQPACKET socket: the framing both sides share. Knows no messages.

One packet is one message, whole or not at all. Descriptors ride on the packet they belong to, FDS_PER_PACKET at a
time; what does not fit follows on packets that hold the one byte CONTINUATION.
"""

import array
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from protocol.errors import DaemonUnavailable, MalformedMessage

FDS_PER_PACKET = 128  # the kernel's limit is 253
CONTINUATION = b"\xc1"  # the one byte that never starts a msgpack message
_FD_NBYTES = array.array("i").itemsize
_CREDENTIALS = struct.Struct("3i")


class Credentials(NamedTuple):
    """Who opened the other end of a socket, as the kernel knows it."""

    pid: int
    uid: int


def listen(path: Path, backlog: int) -> socket.socket:
    """Return a non-blocking listening socket at that path; the caller holds the lock of its directory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.bind(str(path))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Return a blocking connection to that path; raise DaemonUnavailable."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        raise DaemonUnavailable("no expertd runs") from None
    except OSError as error:
        sock.close()
        raise DaemonUnavailable(f"expertd does not answer ({error.strerror or error})") from None
    return sock


def peer_credentials(sock: socket.socket) -> Credentials:
    """Return who opened the other end."""
    pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Credentials(pid, uid)


def send_packet(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message with its descriptors; raise OSError (BlockingIOError if a non-blocking peer does not read)."""
    _send(sock, data, fds[:FDS_PER_PACKET])
    for start in range(FDS_PER_PACKET, len(fds), FDS_PER_PACKET):
        _send(sock, CONTINUATION, fds[start : start + FDS_PER_PACKET])


def receive_packet(sock: socket.socket, nbytes_max: int) -> bytes:
    """Return one packet, b"" when the peer is gone; raise MalformedMessage if it is too long.

    There is no room for descriptors: the kernel closes any that a peer sends along.
    """
    data, _, flags, _ = sock.recvmsg(nbytes_max)
    if flags & socket.MSG_TRUNC:
        raise MalformedMessage(f"a packet of more than {nbytes_max} bytes came")
    return data


def receive_packet_with_fds(sock: socket.socket, nbytes_max: int) -> tuple[bytes, list[int]]:
    """Return one packet and its descriptors, which the caller owns; raise MalformedMessage if either was cut."""
    space = socket.CMSG_SPACE(FDS_PER_PACKET * _FD_NBYTES)
    data, ancillary, flags, _ = sock.recvmsg(nbytes_max, space, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for level, kind, payload in ancillary for fd in _fds_in(level, kind, payload)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise MalformedMessage("a packet was cut: too long, or too many open files in this process")
    return data, fds


def receive_more_fds(sock: socket.socket, fds: list[int], n_fds: int) -> list[int]:
    """Return the n_fds descriptors of a message whose first ones are given; raise MalformedMessage, closing all."""
    continues = True
    while continues and len(fds) < n_fds:
        try:
            data, more = receive_packet_with_fds(sock, 1)
        except BaseException:
            close_all(fds)
            raise
        fds.extend(more)
        continues = data == CONTINUATION and bool(more)
    if len(fds) != n_fds:
        n_received = len(fds)
        close_all(fds)
        raise MalformedMessage(f"{n_fds} descriptors were announced, {n_received} came")
    return fds


def duplicate_all(fds: Sequence[int]) -> list[int]:
    """Return further descriptors of the same files, which the caller owns; raise OSError, and keep none then."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401 - what was made before a failure has to be closed
    except OSError:
        close_all(copies)
        raise
    return copies


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    if not fds:
        sock.send(data)
        return
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _fds_in(level: int, kind: int, payload: bytes) -> list[int]:
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    fds = array.array("i")
    fds.frombytes(payload[: len(payload) - len(payload) % _FD_NBYTES])
    return list(fds)
