"""A file whose opening can be held up: how a load is stopped at a known place, without timing.

Linux lets who holds a write lease on a file answer before anybody else's open of it goes on; the opener waits, up to
/proc/sys/fs/lease-break-time seconds, and the holder gets a signal: then the other side is known to stand there.
"""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from tests.support.waiting import wait_until


class HeldFile:
    """A file under lease."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._has_opener = False

    def note_opener(self, _number: int, _frame: FrameType | None) -> None:
        """Take the kernel's signal. A handler, for a mask would hold for one thread only, and libraries have theirs."""
        self._has_opener = True

    def wait_for_opener(self) -> None:
        """Return when somebody stands at the file and waits; raise TimeoutError."""
        wait_until(lambda: self._has_opener, "somebody to open the held file")

    def release(self) -> None:
        """Let the opener go on."""
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@contextmanager
def held_file(path: Path) -> Iterator[HeldFile]:
    """Hold up everybody who opens that file; skip the test where the file system knows no leases."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    held = HeldFile(fd)
    handler = signal.signal(signal.SIGIO, held.note_opener)
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"no leases on this file system ({error.strerror})")
        yield held
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, handler)
