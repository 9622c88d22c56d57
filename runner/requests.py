"""The request channel as a runner has it: a ZeroMQ DEALER, and the runner's one door to ZeroMQ.

Messages may be lost, in either direction: whoever asks asks again. That the session is gone is seen on its control
connection, which is watched while an answer is waited for. Who blocks whom: `wait` blocks its caller, `send` nobody;
what does not fit into the queue is lost.
"""

import math
import time
from types import TracebackType
from typing import Self

import zmq

from protocol.bell import Bell
from protocol.codec import decode, encode
from protocol.control_client import ControlClient
from protocol.errors import MalformedMessage
from protocol.messages import Message
from protocol.runtime_dir import RuntimeDir
from protocol.schema import MESSAGE_NBYTES_MAX, Channel, Sender
from runner.errors import SessionGone, StoreUnavailable

_QUEUE_LENGTH = 256
_READABLE = int(zmq.POLLIN)  # the enumeration's own arithmetic would cost more than the question
# Who waits at a bell looks so often whether there is a message, or the session is gone.
_LOOK_S = 5e-3


class Requests:
    """One session's requests; of one thread. Close it, or use it in a `with`; the control connection outlives it."""

    def __init__(self, directory: RuntimeDir, control: ControlClient) -> None:
        self._control = control
        self._token = control.welcome.token
        self._context = zmq.Context()
        try:
            self._socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:  # no descriptors
            self._context.term()
            raise StoreUnavailable(f"no socket for requests can be made ({error.strerror})") from None
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, _QUEUE_LENGTH),
            (zmq.RCVHWM, _QUEUE_LENGTH),
            (zmq.MAXMSGSIZE, MESSAGE_NBYTES_MAX),
        ):
            self._socket.setsockopt(option, value)
        self._socket.connect(directory.request_endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(control.fileno(), zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; calling it again does nothing."""
        self._socket.close()
        self._context.term()

    def send(self, message: Message) -> None:
        """Send a message, or lose it if the daemon does not read."""
        try:
            self._socket.send_multipart([self._token, encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return

    def receive(self) -> Message | None:
        """Return the next message, None if there is none yet; raise StoreUnavailable."""
        if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
            return None
        return _decoded(self._socket.recv(zmq.NOBLOCK))

    def wait(self, bell: Bell, n_rings: int, timeout_s: float) -> bool:
        """Wait for a message, or until the bell was rung more often than that; return False if nothing came in time.

        Raise SessionGone.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, end_s - time.monotonic())
            if bell.can_be_waited_at:
                if bell.wait(n_rings, min(left_s, _LOOK_S)):
                    return True
                ready = dict(self._poller.poll(0))
            else:
                ready = dict(self._poller.poll(math.ceil(left_s * 1e3)))
            if self._socket in ready:
                return True
            if self._control.fileno() in ready and not self._control.is_open():
                raise SessionGone("the session with expertd has ended")
            if not left_s:
                return False


def _decoded(data: bytes) -> Message:
    try:
        return decode(data, Channel.REQUEST, Sender.DAEMON)
    except MalformedMessage as error:
        raise StoreUnavailable(f"expertd sent what is no message: {error}") from None
