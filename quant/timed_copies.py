"""Copies in order, by a thread of their own, that take as long as behind a link of a stated speed.

The door to csrc/timed_copies.c, or to a thread of the interpreter where the library was not built. Knows addresses and
times; whose memory it is, and which events order what, the stand-in accelerator knows (runner/devices).

Who may block whom. Adding, holding and releasing never block, and are called by one thread at a time. `wait` blocks the
calling thread, without the interpreter's lock; the thread that copies needs that lock for nothing.
"""

import ctypes
import functools
from typing import Protocol

from quant.library import check_status, library
from quant.timed_copies_reference import ThreadCopies


class Copies(Protocol):
    """A queue of copies. What is added has a place, counted from 1. Whoever started it closes it."""

    def close(self) -> None:
        """End the thread when it has done all that was added; nothing that is held may be left."""
        ...

    def add(self, target: int, source: int, nbytes: int, duration_s: float) -> int:
        """Copy nbytes from one address to another, in turn; return the copy's place.

        It is done when the bytes are there and, on the link, its time is over: it starts there when it was added or
        when the link is free, whichever is later. The memory stays valid until then.
        """
        ...

    def hold(self, number: int) -> int:
        """Begin what is added from now on when that number was released; return the hold's place."""
        ...

    def release(self, number: int) -> None:
        """Release all numbers up to this one; numbers are released in their order."""
        ...

    def are_done(self, place: int) -> bool:
        """Return whether all up to that place is done."""
        ...

    def wait(self, place: int) -> None:
        """Block until all up to that place is done."""
        ...

    def skip(self) -> None:
        """Copy nothing from now on: what was added is done as soon as it is not held."""
        ...


class CCopies:
    """Copies by the library's thread."""

    def __init__(self, functions: "_Functions") -> None:
        self._functions = functions
        self._place = ctypes.c_int64()
        self._place_address = ctypes.byref(self._place)
        self._address: ctypes.c_void_p | None = None
        address = ctypes.c_void_p()
        check_status(functions.start(ctypes.byref(address)), "copies")
        self._address = address

    def __del__(self) -> None:
        self._stop(gives_up=True)

    def close(self) -> None:
        """End the thread when it has done all that was added."""
        self._stop(gives_up=False)

    def add(self, target: int, source: int, nbytes: int, duration_s: float) -> int:
        """Copy nbytes from one address to another, in turn; return the copy's place."""
        status = self._functions.add(self._address, target, source, nbytes, int(duration_s * 1e9), self._place_address)
        if status:
            check_status(status, "a copy")
        return self._place.value

    def hold(self, number: int) -> int:
        """Begin what is added from now on when that number was released; return the hold's place."""
        check_status(self._functions.hold(self._address, number, self._place_address), "copies")
        return self._place.value

    def release(self, number: int) -> None:
        """Release all numbers up to this one."""
        check_status(self._functions.release(self._address, number), "copies")

    def are_done(self, place: int) -> bool:
        """Return whether all up to that place is done."""
        return bool(self._functions.are_done(self._address, place))

    def wait(self, place: int) -> None:
        """Block until all up to that place is done."""
        check_status(self._functions.wait(self._address, place), "copies")

    def skip(self) -> None:
        """Copy nothing from now on."""
        check_status(self._functions.skip(self._address), "copies")

    def _stop(self, *, gives_up: bool) -> None:
        address, self._address = self._address, None
        if address is not None:
            check_status(self._functions.stop(address, gives_up), "closing copies")


class _Functions:
    """The library's functions with their types.

    Those that only leave word are called with the interpreter's lock held: to give it up and get it back would take
    longer than they do.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        address, count, place = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
        at_once, freely = ctypes.PYFUNCTYPE, ctypes.CFUNCTYPE
        self.start = freely(ctypes.c_int, ctypes.POINTER(address))(("expertd_copies_start", loaded))
        self.stop = freely(ctypes.c_int, address, count)(("expertd_copies_stop", loaded))
        self.add = at_once(ctypes.c_int, address, address, address, count, count, place)(("expertd_copies_add", loaded))
        self.hold = at_once(ctypes.c_int, address, count, place)(("expertd_copies_hold", loaded))
        self.release = at_once(ctypes.c_int, address, count)(("expertd_copies_release", loaded))
        self.are_done = at_once(ctypes.c_int, address, count)(("expertd_copies_are_done", loaded))
        self.wait = freely(ctypes.c_int, address, count)(("expertd_copies_await", loaded))
        self.skip = at_once(ctypes.c_int, address)(("expertd_copies_skip", loaded))


def start_copies() -> Copies:
    """Return copies, their thread started; raise MemoryError if it cannot be."""
    loaded = library()
    return ThreadCopies() if loaded is None else CCopies(_typed(loaded))


@functools.cache
def _typed(loaded: ctypes.CDLL) -> _Functions:
    return _Functions(loaded)
