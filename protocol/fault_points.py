"""Steps at which a process can be made to die, to freeze or to fail: faults at a place, not after a time.

The environment variable EXPERTD_FAULT_POINT arms one point of one process, `POINT=ACTION` or `POINT=ACTION@N`:

    daemon-segment-filled=kill     SIGKILL at the first segment that is read and not yet sealed
    daemon-reply-sent=stop@2       SIGSTOP behind the second reply; SIGCONT lets it go on
    daemon-record-reading=fail@3   OSError (EIO) at the third record; fail@3+ at the third and all that follow

Only the tests use it. Without the variable a point costs one comparison. Whoever can set the variable could have killed
the process as well.
"""

import errno
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from protocol.errors import FaultPointUnknown


class FaultPoint(StrEnum):
    """Every step that has a point, in the order in which a process comes there."""

    # --- clients: runners, and the command `expertd`
    CLIENT_CONNECTED = "client-connected"
    CLIENT_HELLO_SENT = "client-hello-sent"
    CLIENT_WELCOMED = "client-welcomed"
    CLIENT_LOAD_ASKED = "client-load-asked"
    CLIENT_ATTACH_SENT = "client-attach-sent"
    CLIENT_FDS_RECEIVED = "client-fds-received"
    CLIENT_OFFER_SENT = "client-offer-sent"
    RUNNER_CATALOGUE_MAPPED = "runner-catalogue-mapped"
    RUNNER_ATTACHED = "runner-attached"
    RUNNER_EXPERTS_DEMANDED = "runner-experts-demanded"
    RUNNER_EXPERTS_GRANTED = "runner-experts-granted"
    RUNNER_SLOTS_COMPUTED = "runner-slots-computed"
    RUNNER_EXPERTS_RELEASED = "runner-experts-released"
    RUNNER_TOKEN_CHOSEN = "runner-token-chosen"  # noqa: S105 - a step, no secret
    # --- the daemon's start
    DAEMON_LOCKED = "daemon-locked"
    DAEMON_CONTROL_BOUND = "daemon-control-bound"
    DAEMON_REQUESTS_BOUND = "daemon-requests-bound"
    DAEMON_READY = "daemon-ready"
    # --- a session on its control channel
    DAEMON_ACCEPTED = "daemon-accepted"
    DAEMON_MESSAGE_RECEIVED = "daemon-message-received"
    DAEMON_REPLY_SENT = "daemon-reply-sent"
    DAEMON_SESSION_ENDING = "daemon-session-ending"
    # --- a load
    DAEMON_FILES_OPENED = "daemon-files-opened"
    DAEMON_SEGMENT_POPULATED = "daemon-segment-populated"
    DAEMON_RECORD_READING = "daemon-record-reading"
    DAEMON_SEGMENT_FILLED = "daemon-segment-filled"
    DAEMON_SEGMENTS_SEALED = "daemon-segments-sealed"
    DAEMON_STORE_LOADED = "daemon-store-loaded"
    DAEMON_OFFER_PROVEN = "daemon-offer-proven"
    # --- an expert of a store larger than memory
    DAEMON_SLOT_READING = "daemon-slot-reading"
    DAEMON_SLOT_FILLED = "daemon-slot-filled"
    # --- a request
    DAEMON_REQUEST_RECEIVED = "daemon-request-received"
    DAEMON_REQUEST_ANSWERED = "daemon-request-answered"
    # --- the daemon's end
    DAEMON_DRAINING = "daemon-draining"
    DAEMON_SOCKETS_CLOSED = "daemon-sockets-closed"


class FaultAction(StrEnum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"
    FAIL = "fail"


@dataclass(slots=True)
class _Armed:
    """The one point that is armed in this process, if any, and how often it was passed."""

    point: FaultPoint | None = None
    action: FaultAction = FaultAction.KILL
    at: int = 1
    repeats: bool = False
    passes: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # its next() is one step for all threads


# Global, though nothing else is: a point may lie in any thread and any layer, and what is handed through all of them
# would be in everybody's way for the sake of tests.
_armed = _Armed()

_PATTERN = re.compile(r"([a-z-]+)=([a-z]+)(?:@([1-9][0-9]{0,8})(\+?))?")


def arm(order: str | None) -> None:
    """Arm this process, None disarms it; raise FaultPointUnknown. To be called before there are threads."""
    _armed.point = None
    if not order:
        return
    match = _PATTERN.fullmatch(order)
    points, actions = list(map(str, FaultPoint)), list(map(str, FaultAction))
    if match is None or match[1] not in points or match[2] not in actions:
        raise FaultPointUnknown(
            f"EXPERTD_FAULT_POINT: POINT=ACTION or POINT=ACTION@N was expected, {order!r:.80} came; "
            f"points: {', '.join(points)}; actions: {', '.join(actions)}"
        )
    _armed.action, _armed.at, _armed.repeats = FaultAction(match[2]), int(match[3] or 1), bool(match[4])
    _armed.passes = itertools.count(1)
    _armed.point = FaultPoint(match[1])


def reached(point: FaultPoint) -> None:
    """Do here what this process is armed for; raise OSError if that is to fail."""
    if _armed.point is point:
        _pass()


def _pass() -> None:
    n_passes = next(_armed.passes)
    if n_passes < _armed.at or (n_passes > _armed.at and not _armed.repeats):
        return
    match _armed.action:
        case FaultAction.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultAction.STOP:
            # To this thread, which goes no step further then; one to the process may be taken by another one, later.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case FaultAction.FAIL:
            raise OSError(errno.EIO, f"fault point {_armed.point}")
