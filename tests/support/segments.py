"""Which segments the processes of a test hold, and the memory they take: theirs alone, whatever else the machine does.

A segment has no name; it lives as long as somebody holds a descriptor of it or maps it, and is told from others by its
inode. A process that forbids inspection shows neither but to root.
"""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from tests.support.daemon import DaemonProcess

# Address range, permissions, offset, device, inode, path.
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +/memfd:(expertd\S*)")

# A process or a descriptor is gone meanwhile, or may not be looked at.
_UNSEEN = (FileNotFoundError, ProcessLookupError, PermissionError)

Segment = tuple[int, int]  # device and inode

ALL = "expertd"
SEALED = "expertd-store"  # dense weights and experts that are in memory for good


def segments_of(*pids: int, named: str = ALL) -> dict[Segment, int]:
    """Return the bytes of memory of each segment that one of those processes holds; each counts once."""
    held: dict[Segment, int] = {}
    for pid in pids:
        held |= _mapped(pid, named)
    # Later, for they know best: a mapping tells how far it reaches, a descriptor what is really taken.
    for pid in pids:
        held |= _open(pid, named)
    return held


def segments_of_all(daemon: DaemonProcess, *pids: int) -> dict[Segment, int]:
    """Return the same of a daemon and its clients; without what the daemon alone holds where it cannot be seen."""
    return segments_of(daemon.pid, *pids)


def is_held(daemon: DaemonProcess, segments: Collection[Segment]) -> bool:
    """Whether the daemon or any other process that can be seen holds one; skip the test where the daemon cannot be."""
    daemon.fds()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return any(not segments_of(pid).keys().isdisjoint(segments) for pid in pids)


def _open(pid: int, named: str) -> dict[Segment, int]:
    """Return the segments of a process's descriptors; none of one that has ended or hides them."""
    found: dict[Segment, int] = {}
    with suppress(*_UNSEEN):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(*_UNSEEN):
                if str(fd.readlink()).startswith(f"/memfd:{named}"):
                    status = fd.stat()
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def _mapped(pid: int, named: str) -> dict[Segment, int]:
    """Return the segments that a process maps, from the first byte to the last one mapped."""
    found: dict[Segment, int] = {}
    with suppress(*_UNSEEN):
        for mapping in _MAPPING.finditer(Path(f"/proc/{pid}/maps").read_text()):
            if not mapping[7].startswith(named):
                continue
            start, stop, offset, major, minor = (int(group, 16) for group in mapping.groups()[:5])
            segment = (os.makedev(major, minor), int(mapping[6]))
            found[segment] = max(found.get(segment, 0), offset + stop - start)
    return found
