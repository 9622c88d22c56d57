"""A client's end of the control channel: hello, then one question and one answer at a time. Blocks its caller only.

The open connection is the session: closing it gives back all the daemon held for it. The daemon is not trusted more
than a file: whose process it is, every length and every answer is checked here.
"""

import os
import select
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from protocol import fdpass
from protocol.codec import decode, encode
from protocol.errors import (
    DaemonSilent,
    DaemonUnavailable,
    MalformedMessage,
    RequestRefused,
    RuntimeDirError,
    VersionMismatch,
)
from protocol.fault_points import FaultPoint, reached
from protocol.messages import Attach, Attached, Code, Draining, Hello, Message, Offer, Refused, Welcome
from protocol.runtime_dir import RuntimeDir, check_runtime_dir
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from protocol.version import HIGHEST_PROTOCOL_VERSION, LIBRARY_VERSION, LOWEST_PROTOCOL_VERSION

_Answer = TypeVar("_Answer", bound=Message)
_GONE = "expertd closed the connection"


class ControlClient:
    """One session with the daemon; a context manager. Not for several threads at once."""

    def __init__(self, directory: RuntimeDir, *, timeout_s: float = 10.0) -> None:
        """Connect and say hello; raise RuntimeDirError, DaemonUnavailable or VersionMismatch."""
        if not _exists(directory):
            raise DaemonUnavailable("no expertd runs")
        check_runtime_dir(directory)
        self._sock = fdpass.connect(directory.control_socket, timeout_s)
        try:
            reached(FaultPoint.CLIENT_CONNECTED)
            _check_owner(self._sock)
            self.welcome = self._say_hello()
            reached(FaultPoint.CLIENT_WELCOMED)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when something came unasked, or the session has ended."""
        return self._sock.fileno()

    def is_open(self) -> bool:
        """Take what came unasked, without blocking; return whether the session goes on."""
        while True:
            try:
                # Not by the socket's own method, which waits: with a time limit the descriptor does not block.
                data = os.read(self._sock.fileno(), MESSAGE_NBYTES_MAX)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False

    def ask(self, question: Message, answer: type[_Answer]) -> _Answer:
        """Return the daemon's answer; raise RequestRefused, DaemonUnavailable or MalformedMessage."""
        self._send(question)
        return self._answer(answer)

    def attach(self, digest: str) -> list[int]:
        """Return the descriptors of a loaded store, catalogue first, which the caller owns; raise as `ask` does."""
        self._send(Attach(digest))
        reached(FaultPoint.CLIENT_ATTACH_SENT)
        reply, fds = self._receive()
        while isinstance(reply, Draining):
            reply, fds = self._receive()
        try:
            attached = _expect(reply, Attached)
        except BaseException:
            fdpass.close_all(fds)
            raise
        try:
            fds = fdpass.receive_more_fds(self._sock, fds, attached.n_fds)
        except OSError as error:
            raise _unavailable(self._sock, error) from None
        reached(FaultPoint.CLIENT_FDS_RECEIVED)
        return fds

    def offer(self, offer: Offer, fds: Sequence[int]) -> None:
        """Send an offer with its descriptors, which stay the caller's; raise DaemonUnavailable.

        The answer may take long: `is_answered`, then `offer_answer`.
        """
        try:
            fdpass.send_packet(self._sock, encode(offer), fds)
        except OSError as error:
            raise _unavailable(self._sock, error) from None
        reached(FaultPoint.CLIENT_OFFER_SENT)

    def is_answered(self) -> bool:
        """Whether there is something to be received, if only the end."""
        return bool(select.select([self._sock], [], [], 0.0)[0])

    def offer_answer(self) -> None:
        """Return if the offer was taken: the session is attached; raise RequestRefused or DaemonUnavailable."""
        self._answer(Attached)

    def _say_hello(self) -> Welcome:
        self._send(Hello(LOWEST_PROTOCOL_VERSION, HIGHEST_PROTOCOL_VERSION, LIBRARY_VERSION))
        reached(FaultPoint.CLIENT_HELLO_SENT)
        try:
            welcome = self._answer(Welcome)
        except RequestRefused as refusal:
            if refusal.code == Code.DRAINING:
                raise DaemonUnavailable(refusal.detail) from None
            if refusal.code != Code.VERSION_MISMATCH:
                raise
            raise VersionMismatch(
                f"{refusal.detail}; this client speaks {LOWEST_PROTOCOL_VERSION} to {HIGHEST_PROTOCOL_VERSION}: "
                f"end the other daemon with `kill {fdpass.peer_credentials(self._sock).pid}`"
            ) from None
        if not LOWEST_PROTOCOL_VERSION <= welcome.version <= HIGHEST_PROTOCOL_VERSION:
            raise VersionMismatch(f"expertd chose protocol version {welcome.version}, which was not offered to it")
        return welcome

    def _answer(self, answer: type[_Answer]) -> _Answer:
        while True:
            reply, fds = self._receive()
            fdpass.close_all(fds)
            if not isinstance(reply, Draining):  # said unasked; the answer still comes
                return _expect(reply, answer)

    def _send(self, message: Message) -> None:
        try:
            fdpass.send_packet(self._sock, encode(message))
        except BrokenPipeError:
            return  # the daemon hung up; why is what it sent last
        except OSError as error:
            raise _unavailable(self._sock, error) from None

    def _receive(self) -> tuple[Message, list[int]]:
        try:
            data, fds = fdpass.receive_packet_with_fds(self._sock, MESSAGE_NBYTES_MAX)
        except OSError as error:
            raise _unavailable(self._sock, error) from None
        if not data:
            raise DaemonUnavailable(_GONE)
        try:
            return decode(data, Channel.CONTROL, Sender.DAEMON), fds
        except MalformedMessage:
            fdpass.close_all(fds)
            raise


def _exists(directory: RuntimeDir) -> bool:
    try:
        directory.path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RuntimeDirError(f"{directory.path}: {error.strerror}") from None
    return True


def _check_owner(sock: socket.socket) -> None:
    peer = fdpass.peer_credentials(sock)
    if peer.uid != os.geteuid():
        raise DaemonUnavailable(f"the process at the control socket belongs to user {peer.uid}")


def _expect(reply: Message, answer: type[_Answer]) -> _Answer:
    if isinstance(reply, Refused):
        raise RequestRefused(reply.code, reply.detail)
    if not isinstance(reply, answer):
        raise MalformedMessage(f"{answer.__name__} was expected from expertd, {type(reply).__name__} came")
    return reply


def _unavailable(sock: socket.socket, error: OSError) -> DaemonUnavailable:
    if isinstance(error, socket.timeout):
        pid = fdpass.peer_credentials(sock).pid
        return DaemonSilent(f"expertd did not answer in time; is it stopped? `kill -9 {pid}` ends it if it must")
    if isinstance(error, ConnectionResetError):  # it went with something of ours unread
        return DaemonUnavailable(_GONE)
    return DaemonUnavailable(f"the connection to expertd broke ({error.strerror or error})")
