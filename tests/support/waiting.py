"""Waiting without sleeping away: for a condition, a line, the end of a process; always with a deadline."""

import os
import select
import time
from collections.abc import Callable
from threading import Event

WITHIN_S = 20.0
_POLL_S = 0.005


def wait_until(condition: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    """Return as soon as the condition holds; raise TimeoutError naming what was waited for."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {within_s:.0f} s for: {what}")
        Event().wait(_POLL_S)


def wait_readable(fd: int, what: str, within_s: float = WITHIN_S) -> None:
    """Return as soon as the descriptor can be read; raise TimeoutError."""
    if not select.select([fd], [], [], within_s)[0]:
        raise TimeoutError(f"waited {within_s:.0f} s for: {what}")


def wait_for_exit(pid: int, within_s: float = WITHIN_S) -> None:
    """Return when that process, anybody's child, has ended; raise TimeoutError."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(pidfd, f"the end of process {pid}", within_s)
    finally:
        os.close(pidfd)
