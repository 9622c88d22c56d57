"""What a test may leave behind: nothing. Descriptors, mappings of segments, child processes, daemons."""

import fcntl
import gc
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import stop_background_daemon
from tests.support.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Holdings:
    """What this process holds: open descriptors and mapped segments by name, its children."""

    fds: Counter[str]
    segments: Counter[str]
    children: frozenset[int]

    def beyond(self, earlier: "Holdings") -> list[str]:
        """Return one line for each thing that was not held earlier."""
        return [
            *(f"descriptor {name} x {n}" for name, n in (self.fds - earlier.fds).items()),
            *(f"mapped segment {name} x {n}" for name, n in (self.segments - earlier.segments).items()),
            *(f"child process {pid}" for pid in self.children - earlier.children),
        ]


def holdings() -> Holdings:
    """Return what this process holds now."""
    return Holdings(
        Counter(_fd_names()), Counter(_segment_names()), frozenset(child.pid for child in psutil.Process().children())
    )


def leaks_since(earlier: Holdings) -> list[str]:
    """Return what this process holds more than earlier; what is only waiting to be collected is no leak."""
    found = holdings().beyond(earlier)
    if found:
        gc.collect()
        found = holdings().beyond(earlier)
    return found


def stop_left_daemon(directory: RuntimeDir) -> bool:
    """End a daemon that still holds the lock of that directory; return whether there was one."""
    if not directory.lock.exists():
        return False
    if _is_free(directory.lock):
        return False
    stop_background_daemon(directory)
    wait_until(lambda: _is_free(directory.lock), "the lock of a left daemon")
    return True


def _is_free(lock: Path) -> bool:
    fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _fd_names() -> list[str]:
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except FileNotFoundError:  # the descriptor that listed them
            continue
    # Sockets and pipes are numbered: any socket is like any other.
    return [name.split(":[")[0] for name in names if not name.startswith(f"/proc/{os.getpid()}/fd")]


def _segment_names() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split("/memfd:")[1] for line in lines if "/memfd:expertd" in line]
