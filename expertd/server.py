"""The request socket: a ZeroMQ ROUTER in a thread of its own, and the one door to ZeroMQ.

A request is three frames: the routing id ZeroMQ adds, the session's token, one message. Frames without a valid token
from that very process are counted and ignored. ROUTER cannot disconnect a peer, so a peer that misbehaves loses its
session instead. Who blocks whom: nobody; a peer that does not read loses its reply.
"""

import logging
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import zmq

from expertd.errors import StartFailed
from expertd.requests import Reply
from expertd.service import Service
from expertd.sessions import Session
from protocol.codec import decode, encode
from protocol.errors import MalformedMessage
from protocol.fault_points import FaultPoint, reached
from protocol.fdpass import Credentials
from protocol.messages import Refused, RequestRefusal
from protocol.runtime_dir import RuntimeDir
from protocol.schema import MESSAGE_NBYTES_MAX, SESSIONS_MAX, Channel, Sender

logger = logging.getLogger(__name__)

LIBZMQ_LOWEST = (4, 3, 5)  # earlier ones have known holes
_FRAMES_MAX = 3
_QUEUE_LENGTH = 64
_REQUESTS_AT_ONCE = 16
_READABLE = int(zmq.POLLIN)  # the enumeration's own arithmetic would cost more than the question


class RequestServer(threading.Thread):
    """The request thread. Every call into the service is made under the lock it shares with the control thread."""

    def __init__(
        self,
        directory: RuntimeDir,
        service: Service,
        lock: threading.Lock,
        *,
        clock: Callable[[], float],
        drop_session: Callable[[Session], None],
        on_failure: Callable[[], None],
    ) -> None:
        """Bind the socket; raise StartFailed if libzmq is too old."""
        super().__init__(name="expertd-requests", daemon=True)
        if zmq.zmq_version_info() < LIBZMQ_LOWEST:
            raise StartFailed(f"libzmq {zmq.zmq_version()} is too old, {'.'.join(map(str, LIBZMQ_LOWEST))} is needed")
        self._service = service
        self._lock = lock
        self._clock = clock
        self._drop_session = drop_session
        self._on_failure = on_failure
        self._collect_at: float | None = None
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),  # without it a reply to a gone peer vanishes in silence
            (zmq.SNDHWM, _QUEUE_LENGTH),
            (zmq.RCVHWM, _QUEUE_LENGTH),
            (zmq.MAXMSGSIZE, MESSAGE_NBYTES_MAX),
            (zmq.HANDSHAKE_IVL, 2000),
        ):
            self._socket.setsockopt(option, value)
        self._socket.bind(directory.request_endpoint)
        reached(FaultPoint.DAEMON_REQUESTS_BOUND)

    def run(self) -> None:
        """Answer requests until stopped, or until a fault of ours, which ends the daemon."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_reader, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        try:
            while self._stop_reader not in (events := dict(poller.poll(self._wait_ms()))):
                if self._socket in events:
                    self._serve_waiting()
                if self._wake_reader in events or self._is_collection_due():
                    self._collect()
        except Exception:  # the one net of this thread: without it, it would end in silence
            logger.exception("the request thread failed by a fault of ours")
            self._on_failure()

    def wake(self) -> None:
        """Have the thread look for answers that are due; may be called from any thread."""
        with suppress(BlockingIOError):  # a full pipe wakes it just as well
            os.write(self._wake_writer, b"\0")

    def stop(self) -> None:
        """End the thread and close the socket."""
        os.write(self._stop_writer, b"\0")
        self.join()
        self._socket.close()
        self._context.term()
        for fd in (self._stop_reader, self._stop_writer, self._wake_reader, self._wake_writer):
            os.close(fd)

    def _wait_ms(self) -> int | None:
        with self._lock:
            self._collect_at = self._service.requests.next_collection()
        return None if self._collect_at is None else math.ceil(max(0.0, self._collect_at - self._clock()) * 1000)

    def _is_collection_due(self) -> bool:
        return self._collect_at is not None and self._collect_at <= self._clock()

    def _collect(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)
        with self._lock:
            replies = self._service.requests.collect(self._clock())
        self._send(replies)

    def _serve_waiting(self) -> None:
        """Answer what has come in, so much of it that nobody who is woken for something else waits long."""
        with suppress(zmq.Again):
            for _ in range(_REQUESTS_AT_ONCE):
                self._serve_one()
                if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
                    return

    def _serve_one(self) -> None:
        """Answer one request; raise zmq.Again if there is none."""
        frames = self._receive_frames()
        if frames is None:
            with self._lock:
                self._service.note_stray_frame()
            return
        routing_id, token, data = frames
        peer = _credentials(token)
        with self._lock:
            session = self._service.session_of(token.bytes, peer) if peer is not None else None
            if session is None:
                self._service.note_stray_frame()
                return
            session.routing_id = routing_id.bytes
            replies = self._answer(session, data.bytes)
        self._send(replies)

    def _receive_frames(self) -> tuple[zmq.Frame, zmq.Frame, zmq.Frame] | None:
        """Return the three frames of a request; None if there were more or fewer. The rest is read and forgotten."""
        # A message comes whole or not at all: only its first frame may be missing.
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        frames, n_frames = [frame], 1
        while frame.more:
            frame = self._socket.recv(copy=False)
            n_frames += 1
            if n_frames <= _FRAMES_MAX:
                frames.append(frame)
        return (frames[0], frames[1], frames[2]) if n_frames == _FRAMES_MAX else None

    def _answer(self, session: Session, data: bytes) -> list[Reply]:
        try:
            message = decode(data, Channel.REQUEST, Sender.CLIENT)
        except MalformedMessage as error:
            outcome = self._service.note_bad_message(session, str(error))
            if outcome.must_drop:
                self._drop_session(session)
            return [Reply(session, RequestRefusal(0, outcome.reply))] if isinstance(outcome.reply, Refused) else []
        reached(FaultPoint.DAEMON_REQUEST_RECEIVED)
        began_at = self._clock()
        replies = self._service.requests.handle(session, message, began_at)
        own = next((reply.message for reply in replies if reply.session is session), None)
        self._service.counters.request(message, own, self._clock() - began_at)
        return replies

    def _send(self, replies: list[Reply]) -> None:
        for reply in replies:
            try:
                data = encode(reply.message)
                self._socket.send(reply.session.routing_id, zmq.SNDMORE | zmq.NOBLOCK)
                self._socket.send(data, zmq.NOBLOCK)
                reached(FaultPoint.DAEMON_REQUEST_ANSWERED)
            except zmq.ZMQError as error:
                logger.warning("reply dropped error=%s", error)


def libzmq_version() -> tuple[int, ...]:
    """Return the version of the ZeroMQ library in use."""
    return zmq.zmq_version_info()


def _credentials(frame: zmq.Frame) -> Credentials | None:
    """Return which process sent a frame; libzmq writes it as `localhost:uid:gid:pid` from the kernel's word.

    None for a peer that speaks ZMTP 2 or older: libzmq takes its frames, and keeps no word of where they come from.
    """
    try:
        address = frame.get("Peer-Address")
    except zmq.ZMQError:
        return None
    return _parsed(str(address))


@lru_cache(maxsize=SESSIONS_MAX)
def _parsed(address: str) -> Credentials:
    _, uid, _, pid = address.split(":")
    return Credentials(int(pid), int(uid))
