"""Which processes still map a store of a daemon that is gone. Reads /proc; sees what this user may see."""

from collections.abc import Collection
from pathlib import Path


def segment_name(digest: str) -> str:
    """Return what a store's segments are called in /proc/PID/maps: nobody opens them by it."""
    return f"expertd-store-{digest[:12]}"


def pids_with_segments(digest: str, known: Collection[int | None]) -> list[int]:
    """Return the processes, beside the known ones, that map that store; those of other users are not seen."""
    mapped = f"/memfd:{segment_name(digest)}".encode()
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in sorted(pids) if pid not in known and _maps(pid, mapped)]


def _maps(pid: int, mapped: bytes) -> bool:
    try:
        return mapped in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False
