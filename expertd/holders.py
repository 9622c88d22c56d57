"""Which processes still map segments of a daemon that is gone. Reads /proc; sees what this user may see."""

from collections.abc import Collection
from pathlib import Path

_MAPPED = b"/memfd:expertd-store"


def pids_with_segments(known: Collection[int | None]) -> list[int]:
    """Return the processes, beside the known ones, that map segments; those of other users are not seen."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in sorted(pids) if pid not in known and _maps_segments(pid)]


def _maps_segments(pid: int) -> bool:
    try:
        return _MAPPED in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False
