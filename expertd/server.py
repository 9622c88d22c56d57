"""The request socket: a ZeroMQ ROUTER in a thread of its own, and the one door to ZeroMQ.

A request is three frames: the routing id ZeroMQ adds, the session's token, one message. Frames without a valid token
from that very process are counted and ignored. ROUTER cannot disconnect a peer, so a peer that misbehaves loses its
session instead. Who blocks whom: nobody; a peer that does not read loses its reply.

The thread waits in one call, for the next frames on its socket: a poll before, over the socket and a pipe, would cost
every request more than its message does. So whoever wakes the thread is a peer of the same socket, inside the process.
"""

import logging
import math
import threading
from collections.abc import Callable
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
# The enumerations' own arithmetic would cost more than the calls.
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
# Taken before anybody else can come, and ROUTER admits no second peer of an id: frames with it are the waker's.
_WAKER = b"waker"
_WAKER_ENDPOINT = "inproc://waker"


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
        self._is_stopping = False
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
        self._socket.bind(_WAKER_ENDPOINT)
        self._waker = self._context.socket(zmq.DEALER)
        self._waker.setsockopt(zmq.ROUTING_ID, _WAKER)
        self._waker.connect(_WAKER_ENDPOINT)
        self._waker_lock = threading.Lock()
        self._is_woken = False
        self._socket.bind(directory.request_endpoint)
        reached(FaultPoint.DAEMON_REQUESTS_BOUND)

    def run(self) -> None:
        """Answer requests until stopped, or until a fault of ours, which ends the daemon."""
        try:
            while not self._is_stopping:
                self._serve_next()
        except Exception:  # the one net of this thread: without it, it would end in silence
            logger.exception("the request thread failed by a fault of ours")
            self._on_failure()

    def wake(self) -> None:
        """Have the thread look for answers that are due; may be called from any thread, and when it has ended."""
        with self._waker_lock:
            if not self._is_woken:  # else a word is on its way already
                self._is_woken = True
                self._waker.send(b"", _NOBLOCK)

    def stop(self) -> None:
        """End the thread and close the socket."""
        self._is_stopping = True
        self.wake()
        self.join()
        with self._waker_lock:
            self._is_woken = True  # for good: there is nobody to be woken
            self._waker.close()
        self._socket.close()
        self._context.term()

    def _serve_next(self) -> None:
        """Wait for a request, a word or a time, and do what is due."""
        try:
            routing_id = self._socket.recv()
        except zmq.Again:  # it is time
            self._collect()
            return
        frames = self._receive_frames()
        if routing_id == _WAKER:
            self._is_woken = False  # before looking: who has news from here on says so anew
            self._collect()
            return
        if frames is None:
            self._note_stray_frame()
        else:
            self._serve(routing_id, *frames)
        if self._collect_at is not None and self._collect_at <= self._clock():
            self._collect()

    def _receive_frames(self) -> tuple[zmq.Frame, zmq.Frame] | None:
        """Return a request's token and message; None if it had more or fewer frames. The rest is read and forgotten."""
        # A message comes whole or not at all: what is read here is there, and ROUTER puts its id before something.
        frame = self._socket.recv(copy=False)
        frames = [frame]
        n_frames = 2
        while frame.more:
            frame = self._socket.recv(copy=False)
            n_frames += 1
            if n_frames <= _FRAMES_MAX:
                frames.append(frame)
        return (frames[0], frames[1]) if n_frames == _FRAMES_MAX else None

    def _serve(self, routing_id: bytes, token: zmq.Frame, data: zmq.Frame) -> None:
        """Answer one request."""
        peer = _credentials(token)
        with self._lock:
            session = self._service.session_of(token.bytes, peer) if peer is not None else None
            if session is None:
                self._service.note_stray_frame()
                return
            session.routing_id = routing_id
            replies = self._answer(session, data.bytes)
            collect_at = self._service.requests.next_collection()
        self._send(replies)
        self._wait_until(collect_at)

    def _note_stray_frame(self) -> None:
        with self._lock:
            self._service.note_stray_frame()

    def _collect(self) -> None:
        """Send the answers that are due for another reason than a request."""
        with self._lock:
            replies = self._service.requests.collect(self._clock())
            collect_at = self._service.requests.next_collection()
        self._send(replies)
        self._wait_until(collect_at)

    def _wait_until(self, collect_at: float | None) -> None:
        """Have the socket give up waiting for requests at that time."""
        if collect_at is None and self._collect_at is None:
            return
        self._collect_at = collect_at
        wait_ms = -1 if collect_at is None else math.ceil(max(0.0, collect_at - self._clock()) * 1000)
        self._socket.setsockopt(zmq.RCVTIMEO, wait_ms)

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
        own = None
        for answered, reply in replies:
            if answered is session:
                own = reply
                break
        self._service.counters.request(message, own, self._clock() - began_at)
        return replies

    def _send(self, replies: list[Reply]) -> None:
        for session, message in replies:
            data = encode(message)
            try:
                self._send_to(session.routing_id, data)
                reached(FaultPoint.DAEMON_REQUEST_ANSWERED)
            except zmq.ZMQError as error:
                logger.warning("reply dropped error=%s", error)

    def _send_to(self, routing_id: bytes, data: bytes) -> None:
        """Send an answer; raise ZMQError if its peer is gone, or does not read."""
        try:
            self._socket.send(routing_id, _NOBLOCK_MORE)
        except zmq.Again:
            # While requests come without a break, the socket learns only now and then of what has been read.
            self._socket.getsockopt(zmq.EVENTS)
            self._socket.send(routing_id, _NOBLOCK_MORE)
        self._socket.send(data, _NOBLOCK)


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
