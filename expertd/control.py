"""The control socket: sessions, descriptors, administration. Runs in the daemon's main thread and never blocks.

One loop waits for new connections, packets, the end of connections, and for work other threads post. No file is read
and nothing is computed here; slow work is handed away. What a message means is `expertd.service`'s business.
"""

import errno
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from expertd.inbox import Inbox, WholeOffer
from expertd.offers import Adoption
from expertd.service import Outcome, Service
from expertd.sessions import Session
from expertd.stores import HeldStore
from protocol import fdpass
from protocol.codec import decode, encode
from protocol.errors import MalformedMessage
from protocol.fault_points import FaultPoint, reached
from protocol.messages import Draining, Message, Offer, Refused
from protocol.runtime_dir import RuntimeDir
from protocol.schema import MESSAGE_NBYTES_MAX, SESSIONS_MAX, Channel, Sender

logger = logging.getLogger(__name__)

_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Connection:
    """A client's socket, its session, and what it has sent of an offer."""

    sock: socket.socket
    session: Session
    inbox: Inbox = field(default_factory=Inbox)


class ControlLoop:
    """The main loop. `post` and `stop` may be called from any thread and from signal handlers, the rest from one.

    The lock guards the service, which the request thread asks too; what is posted runs under it.
    """

    def __init__(
        self,
        directory: RuntimeDir,
        service: Service,
        lock: threading.Lock,
        *,
        clock: Callable[[], float],
        start_load: Callable[[HeldStore], None],
        start_adoption: Callable[[Adoption], None],
        idle_timeout_s: float | None,
        after_round: Callable[[], None] = lambda: None,
        tick_s: float | None = None,
    ) -> None:
        """`after_round` is called behind whatever happened, and every `tick_s` if nothing does, without the lock."""
        self._service = service
        self._lock = lock
        self._clock = clock
        self._start_load = start_load
        self._start_adoption = start_adoption
        self._idle_timeout_s = idle_timeout_s
        self._after_round = after_round
        self._tick_s = tick_s
        self._posted: deque[Callable[[], None]] = deque()
        self._connections: dict[int, Connection] = {}
        self._is_stopping = False
        self._n_dropped_replies = 0
        self._listener = fdpass.listen(directory.control_socket, backlog=SESSIONS_MAX)
        reached(FaultPoint.DAEMON_CONTROL_BOUND)
        # With every descriptor in use a waiting client cannot even be turned away: this one is spent on that.
        self._reserve_fd: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._wake_reader, self.wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

    def post(self, action: Callable[[], None]) -> None:
        """Have the loop's thread call that."""
        self._posted.append(action)
        with suppress(BlockingIOError):  # a full pipe wakes it just as well
            os.write(self.wake_writer, b"\0")

    def stop(self) -> None:
        """Have the loop drain and return."""
        self.post(self._begin_stop)

    def run(self) -> None:
        """Serve until stopped or idle for too long."""
        while not self._is_stopping:
            events = self._selector.select(self._wait_s())
            with self._lock:  # never held while waiting
                for key, _ in events:
                    self._serve(key.fd)
                while self._posted:
                    self._posted.popleft()()
                self._drop_overdue()
                self._stop_if_idle()
            self._after_round()

    def close(self) -> None:
        """Say goodbye to every session and close all sockets."""
        reached(FaultPoint.DAEMON_DRAINING)
        for connection in list(self._connections.values()):
            with suppress(OSError):
                fdpass.send_packet(connection.sock, encode(Draining()))
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        for fd in (self._reserve_fd, self._wake_reader, self.wake_writer):
            if fd is not None:
                os.close(fd)

    def drop_session(self, session: Session) -> None:
        """Close the connection of a session; one that is gone already is no error."""
        for connection in self._connections.values():
            if connection.session is session:
                self._drop(connection)
                return

    def answer(self, session: Session, reply: Message) -> None:
        """Send a session an answer that took its time; one that is gone is no error."""
        for connection in self._connections.values():
            if connection.session is session:
                self._carry_out(connection, Outcome(reply))
                return

    def _begin_stop(self) -> None:
        self._is_stopping = True
        self._service.drain()

    def _serve(self, fd: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd == self._wake_reader:
            with suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
        elif fd in self._connections:  # it may have been dropped earlier in this round
            self._receive(self._connections[fd])

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return
        reached(FaultPoint.DAEMON_ACCEPTED)
        sock.setblocking(False)  # noqa: FBT003 - the socket module's signature
        peer = fdpass.peer_credentials(sock)
        session = self._service.open_session(peer, self._clock())
        if isinstance(session, Refused):
            logger.warning("connection refused uid=%d pid=%d code=%s", peer.uid, peer.pid, session.code)
            _refuse(sock, session)
            return
        self._connections[sock.fileno()] = Connection(sock, session)
        self._selector.register(sock, selectors.EVENT_READ)

    def _turn_away(self) -> None:
        if self._reserve_fd is not None:
            logger.error("out of file descriptors, a client is turned away")
            os.close(self._reserve_fd)
            self._reserve_fd = None
            with suppress(OSError):
                self._listener.accept()[0].close()
        with suppress(OSError):  # another thread may have been quicker; the next client brings us here again
            self._reserve_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _receive(self, connection: Connection) -> None:
        try:
            data, fds = fdpass.receive_packet_with_fds(connection.sock, MESSAGE_NBYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        except MalformedMessage as error:
            self._carry_out(connection, self._service.note_bad_message(connection.session, str(error)))
            return
        if not data:
            self._drop(connection)
            return
        outcome = self._answer(connection, data, fds)
        if outcome is not None:
            self._carry_out(connection, outcome)

    def _answer(self, connection: Connection, data: bytes, fds: list[int]) -> Outcome | None:
        """Return what to do about a packet; None if more belongs to it. Descriptors that come uncalled are closed."""
        session, inbox = connection.session, connection.inbox
        try:
            if inbox.is_waiting:
                return self._take_offer(session, inbox.go_on(data, fds))
            message = decode(data, Channel.CONTROL, Sender.CLIENT)
            if isinstance(message, Offer):
                return self._take_offer(session, inbox.begin(message, fds))
        except MalformedMessage as error:
            fdpass.close_all(fds)
            return self._service.note_bad_message(session, str(error))
        fdpass.close_all(fds)
        reached(FaultPoint.DAEMON_MESSAGE_RECEIVED)
        began_at = self._clock()
        outcome = self._service.handle(session, message, began_at)
        self._service.counters.request(message, outcome.reply, self._clock() - began_at)
        return outcome

    def _take_offer(self, session: Session, offered: WholeOffer | None) -> Outcome | None:
        if offered is None:
            return None
        outcome = self._service.offer(session, offered.message, offered.fds, self._clock())
        if outcome.adoption is None:
            fdpass.close_all(offered.fds)
        return outcome

    def _carry_out(self, connection: Connection, outcome: Outcome) -> None:
        if outcome.load is not None:
            self._start_load(outcome.load)
        if outcome.adoption is not None:
            self._start_adoption(outcome.adoption)
        is_sent = outcome.reply is None or self._send(connection, outcome.reply, outcome.fds)
        if outcome.must_drop or not is_sent:
            self._drop(connection)
        if outcome.must_stop:
            self._begin_stop()

    def _send(self, connection: Connection, reply: Message, fds: tuple[int, ...]) -> bool:
        """Return whether the connection is still good. A client that does not read loses its reply."""
        try:
            fdpass.send_packet(connection.sock, encode(reply), fds)
            reached(FaultPoint.DAEMON_REPLY_SENT)
        except BlockingIOError:
            self._n_dropped_replies += 1
            session = connection.session
            logger.warning(
                "reply dropped, the client does not read session=%d uid=%d pid=%d",
                session.session_id, session.peer.uid, session.peer.pid,
            )  # fmt: skip
            return not fds  # a store half handed over cannot be repaired
        except OSError:
            return False
        return True

    def _drop(self, connection: Connection) -> None:
        """Free everything of one client; the one teardown path."""
        if self._connections.pop(connection.sock.fileno(), None) is None:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        connection.inbox.clear()
        reached(FaultPoint.DAEMON_SESSION_ENDING)
        self._service.close_session(connection.session, self._clock())

    def _drop_overdue(self) -> None:
        for session in self._service.overdue_sessions(self._clock()):
            logger.warning(
                "no hello in time session=%d uid=%d pid=%d", session.session_id, session.peer.uid, session.peer.pid
            )
            self.drop_session(session)

    def _stop_if_idle(self) -> None:
        if self._idle_timeout_s is not None and self._service.idle_s(self._clock()) >= self._idle_timeout_s:
            logger.info("idle, ending idle_s=%g", self._idle_timeout_s)
            self._begin_stop()

    def _wait_s(self) -> float | None:
        ticks = [] if self._tick_s is None else [self._tick_s]
        if any(c.session.token is None for c in self._connections.values()):
            ticks.append(_TICK_S)
        if self._idle_timeout_s is not None:
            ticks.append(min(_TICK_S, self._idle_timeout_s))
        return min(ticks, default=None)


def _refuse(sock: socket.socket, refusal: Refused) -> None:
    """Say why there is no session, and hang up."""
    with sock, suppress(OSError):
        # Closing over an unread hello would reset the connection, and the client would never see the reason.
        sock.shutdown(socket.SHUT_RD)
        with suppress(MalformedMessage):
            fdpass.receive_packet(sock, MESSAGE_NBYTES_MAX)
        fdpass.send_packet(sock, encode(refusal))
