"""Processes that stand still at a fault point, and what a process holds, to be compared with an undisturbed one."""

import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

from protocol import messages as m
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_until


def is_frozen(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    # The command's name stands in parentheses and may hold anything; the state is the word behind it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_until_frozen(pid: int) -> None:
    """Return when the process stands still; raise TimeoutError."""
    wait_until(lambda: is_frozen(pid), f"process {pid} to come to its fault point")


def thaw(pid: int) -> None:
    """Let a frozen process go on."""
    os.kill(pid, signal.SIGCONT)


def fd_names(pid: int) -> Counter[str]:
    """Return what a process has open, by the last word of its name: any socket is like any other. None where hidden."""
    names: Counter[str] = Counter()
    with suppress(PermissionError):  # an ordinary user does not see those of a process that forbids inspection
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            names[fd.readlink().name.split(":[")[0]] += 1
    return names


def settled_fds(daemon: DaemonProcess) -> Counter[str]:
    """Return what the daemon has open, without the connection this takes."""
    with daemon.client() as client:
        # A connection that ended before is accepted in one round of the daemon's loop and dropped in the next; what is
        # asked may be answered before that in either of them, but not in a third one.
        for _ in range(3):
            client.ask(m.GetStatus(), m.Status)
        return fd_names(daemon.pid) - Counter(["socket"])
