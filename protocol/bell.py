"""A word in shared memory at which processes wait until another one has something new: a futex.

Whoever rings changes the word and wakes all who wait at it; who waits may only read it, so a mapping without leave to
write is enough. A ring is a reason to look, not a message: what has happened is to be seen elsewhere.
"""

import ctypes
import errno
import platform
import threading
from collections.abc import Callable

# The kernel's numbers of the system call `futex`; the C library has no function of that name.
_CALLS = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_ALL = 0x7FFFFFFF
_MODULUS = 1 << 32

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bell:
    """The side that waits; of one thread. The view is the word."""

    def __init__(self, view: memoryview) -> None:
        self._word = ctypes.c_uint32.from_buffer(view)
        self._futex = _futex_call()

    @property
    def can_be_waited_at(self) -> bool:
        """Return whether `wait` waits: on some machines it cannot."""
        return self._futex is not None

    @property
    def n_rings(self) -> int:
        """Return how often it was rung, modulo 2 ** 32."""
        return self._word.value

    def wait(self, n_rings: int, timeout_s: float) -> bool:
        """Wait until it was rung more often than that, or for so long; return whether it was."""
        if self._futex is not None and timeout_s > 0.0 and self._word.value == n_rings:
            timeout = _Timespec(int(timeout_s), int(timeout_s % 1.0 * 1e9))
            if self._futex(ctypes.byref(self._word), _WAIT, n_rings, ctypes.byref(timeout)) < 0:
                _check(ctypes.get_errno())
        return self._word.value != n_rings


class BellRinger:
    """The side that rings, from any thread until `release`."""

    def __init__(self, view: memoryview) -> None:
        self._word = ctypes.c_uint32.from_buffer(view)
        self._futex = _futex_call()
        self._lock = threading.Lock()

    def ring(self) -> None:
        """Have everybody look who waits."""
        with self._lock:
            self._word.value = (self._word.value + 1) % _MODULUS
        if self._futex is not None:
            self._futex(ctypes.byref(self._word), _WAKE, _ALL, None)

    def release(self) -> None:
        """Let go of the memory, before it is unmapped."""
        del self._word


def _futex_call() -> "Callable[..., int] | None":
    number = _CALLS.get(platform.machine())
    if number is None:
        return None

    def futex(word: object, operation: int, value: int, timeout: object) -> int:
        result: int = _libc.syscall(ctypes.c_long(number), word, operation, ctypes.c_uint32(value), timeout, None, 0)
        return result

    return futex


def _check(error: int) -> None:
    if error not in {errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT}:
        raise OSError(error, "the kernel does not let this process wait at a word of shared memory")
