"""What csrc/timed_copies.c does, by a thread of the interpreter: for where the library was not built.

Whoever copies or waits out a copy's time holds neither a lock nor the interpreter's: ctypes gives it up around memmove
and clock_nanosleep. Between copies the thread needs the interpreter, which others may hold.
"""

import ctypes
import threading
import time
from collections import deque
from dataclasses import dataclass

_TIMER_ABSTIME = 1


@dataclass(frozen=True, slots=True)
class _Copy:
    target: int
    source: int
    nbytes: int
    duration_s: float
    added_s: float


@dataclass(frozen=True, slots=True)
class _Hold:
    number: int


class _TimeSpec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class LinkClock:
    """The modelled time up to which a link is occupied; seconds on the caller's clock.

    A copy starts when it was added or when the link is free, whichever is later. Both are points on this clock: a copy
    that was seen to end late does not delay the one behind it, so that delays do not add up over many copies.
    """

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def held_until(self, time_s: float) -> None:
        """Let nothing start before."""
        self._free_at_s = max(self._free_at_s, time_s)

    def end_of(self, duration_s: float, *, added_s: float) -> float:
        """Return when the next copy ends, which occupies the link until then."""
        self._free_at_s = max(self._free_at_s, added_s) + duration_s
        return self._free_at_s


class ThreadCopies:
    """The Copies of timed_copies.py, by a thread of its own; what is said there holds here."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._operations: deque[_Copy | _Hold] = deque()
        self._clock = LinkClock()
        self._n_added = self._n_done = self._released = 0
        self._released_s = 0.0
        self._is_skipping = self._is_ending = False
        self._libc = ctypes.CDLL(None)
        # A daemon: copies that nobody closed, because something else failed, do not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread when it has done all that was added."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join()

    def add(self, target: int, source: int, nbytes: int, duration_s: float) -> int:
        """Copy nbytes from one address to another, in turn; return the copy's place."""
        return self._add(_Copy(target, source, nbytes, duration_s, time.monotonic()))

    def hold(self, number: int) -> int:
        """Begin what is added from now on when that number was released; return the hold's place."""
        return self._add(_Hold(number))

    def release(self, number: int) -> None:
        """Release all numbers up to this one."""
        with self._changed:
            self._released, self._released_s = number, time.monotonic()
            self._changed.notify_all()

    def are_done(self, place: int) -> bool:
        """Return whether all up to that place is done."""
        return self._n_done >= place

    def wait(self, place: int) -> None:
        """Block until all up to that place is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_done >= place)

    def skip(self) -> None:
        """Copy nothing from now on."""
        self._is_skipping = True

    def _add(self, operation: _Copy | _Hold) -> int:
        with self._changed:
            self._operations.append(operation)
            self._n_added += 1
            self._changed.notify_all()
            return self._n_added

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._operations or self._is_ending)
                if not self._operations:
                    return
                operation = self._operations.popleft()
                if isinstance(operation, _Hold):
                    self._hold(operation)
            if isinstance(operation, _Copy) and not self._is_skipping:
                self._copy(operation)
            with self._changed:
                self._n_done += 1
                self._changed.notify_all()

    def _hold(self, hold: _Hold) -> None:
        self._changed.wait_for(lambda: self._released >= hold.number)
        self._clock.held_until(self._released_s)

    def _copy(self, copy: _Copy) -> None:
        ctypes.memmove(copy.target, copy.source, copy.nbytes)
        if copy.duration_s > 0:
            self._wait_until(self._clock.end_of(copy.duration_s, added_s=copy.added_s))

    def _wait_until(self, time_s: float) -> None:
        """Sleep in one call, which gives the interpreter up once."""
        seconds = int(time_s)
        until = _TimeSpec(seconds, int((time_s - seconds) * 1e9))
        while self._libc.clock_nanosleep(time.CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(until), None):
            pass  # a signal's handler ran
