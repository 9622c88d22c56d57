"""The daemon as a process: its lock, its readiness, its memory. Knows neither messages nor stores."""

import ctypes
import fcntl
import logging
import os
import resource
import time
from dataclasses import dataclass
from threading import Event
from types import TracebackType

import psutil

from expertd.cgroup import GroupMeter
from expertd.errors import AlreadyRunning, StartFailed
from expertd.service import MemoryFigures
from protocol.fault_points import FaultPoint, reached
from protocol.runtime_dir import RuntimeDir, create_runtime_dir

logger = logging.getLogger(__name__)

READY = b"R"
BUSY = b"B"

_LOCK_POLL_S = 0.002
_PR_SET_DUMPABLE = 4


class DaemonLock:
    """The right to be the daemon of this user: a flock held for life. A context manager.

    Only its holder may unlink the sockets, so a second daemon can never steal the first one's clients.
    """

    def __init__(self, directory: RuntimeDir, *, within_s: float = 0.0) -> None:
        """Take the lock, waiting so long for its holder; raise AlreadyRunning, StartFailed or RuntimeDirError."""
        create_runtime_dir(directory)
        self._directory = directory
        try:
            self._fd = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartFailed(f"{directory.lock}: cannot be opened ({error.strerror})") from None
        if not _lock(self._fd, within_s):
            os.close(self._fd)
            raise AlreadyRunning("another expertd of this user is running; see `expertd status`")
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())  # for people; nothing reads it
        reached(FaultPoint.DAEMON_LOCKED)
        self._unlink_sockets()

    def __enter__(self) -> "DaemonLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the directory is another's by now, so are its sockets.
        if self._is_lock_in_place():
            self._unlink_sockets()
        os.close(self._fd)

    def is_in_place(self) -> bool:
        """Whether clients still find this daemon: its lock and its sockets lie where they were made."""
        sockets = (self._directory.control_socket, self._directory.request_socket)
        return self._is_lock_in_place() and all(map(os.path.lexists, sockets))

    def _is_lock_in_place(self) -> bool:
        try:
            found = os.lstat(self._directory.lock)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def _unlink_sockets(self) -> None:
        self._directory.control_socket.unlink(missing_ok=True)
        self._directory.request_socket.unlink(missing_ok=True)
        self._directory.metrics_socket.unlink(missing_ok=True)


def _lock(fd: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            Event().wait(_LOCK_POLL_S)
        else:
            return True


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


class MemoryMeter:
    """Reads what this process and the machine hold, through files opened once: with no descriptor left, too."""

    def __init__(self) -> None:
        self._own = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._machine = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._groups = GroupMeter()

    def figures(self) -> MemoryFigures:
        """Return the figures of now."""
        _size, resident, shared, *_ = os.pread(self._own, 4096, 0).split()
        machine = os.pread(self._machine, 1 << 16, 0)
        available_nbytes = int(machine.split(b"MemAvailable:", 1)[1].split(None, 1)[0]) * 1024
        private_nbytes = (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
        return MemoryFigures(private_nbytes, _least(available_nbytes, self._groups.available_nbytes()))

    def close(self) -> None:
        """Close the files; to be called once."""
        os.close(self._own)
        os.close(self._machine)
        self._groups.close()


def available_nbytes() -> int:
    """Return the memory that can still be taken without swapping: of the machine's, and of the control group's."""
    groups = GroupMeter()
    try:
        return _least(int(psutil.virtual_memory().available), groups.available_nbytes())
    finally:
        groups.close()


def allow_all_descriptors() -> None:
    """Raise the limit of open files as far as it goes: libzmq aborts the process when it cannot accept a connection."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def forbid_inspection() -> None:
    """Keep other processes of this user from reading this one's memory and descriptors, and the core dump off disk."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _least(machine_nbytes: int, group_nbytes: int | None) -> int:
    return machine_nbytes if group_nbytes is None else min(machine_nbytes, group_nbytes)
