"""The daemon as a process: its lock, its readiness, its memory. Knows neither messages nor stores."""

import ctypes
import fcntl
import os
from dataclasses import dataclass
from types import TracebackType

import psutil

from expertd.errors import AlreadyRunning
from expertd.service import MemoryFigures
from protocol.runtime_dir import RuntimeDir, create_runtime_dir

READY = b"R"
BUSY = b"B"

_PR_SET_DUMPABLE = 4


class DaemonLock:
    """The right to be the daemon of this user: a flock held for life. A context manager.

    Only its holder may unlink the sockets, so a second daemon can never steal the first one's clients.
    """

    def __init__(self, directory: RuntimeDir) -> None:
        """Take the lock; raise AlreadyRunning or RuntimeDirError."""
        create_runtime_dir(directory)
        self._directory = directory
        self._fd = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise AlreadyRunning("another expertd of this user is running; see `expertd status`") from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())  # for people; nothing reads it
        self._unlink_sockets()

    def __enter__(self) -> "DaemonLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlink_sockets()
        os.close(self._fd)

    def _unlink_sockets(self) -> None:
        self._directory.control_socket.unlink(missing_ok=True)
        self._directory.request_socket.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ReadyPipe:
    """Where the process that started this one waits for one byte; None if nobody waits."""

    fd: int | None

    def tell(self, word: bytes) -> None:
        """Say READY or BUSY; nobody listening any more is no error."""
        if self.fd is None:
            return
        try:
            os.write(self.fd, word)
        except BrokenPipeError:
            pass
        finally:
            os.close(self.fd)


def memory_figures() -> MemoryFigures:
    """Return what this process and the machine hold."""
    own = psutil.Process().memory_info()
    return MemoryFigures(private_nbytes=own.rss - own.shared, available_nbytes=psutil.virtual_memory().available)


def available_nbytes() -> int:
    """Return the memory that can still be taken without swapping."""
    return int(psutil.virtual_memory().available)


def forbid_inspection() -> None:
    """Keep other processes of this user from reading this one's memory and descriptors, and the core dump off disk."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
