"""What a run cost: the memory of this process and the time since it began, as the kernel counts them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one process: its own pages, and those of shared mappings that it has touched."""

    private_nbytes: int
    shared_nbytes: int


def read_memory(proc: Path = _PROC) -> Memory:
    """Return the memory of this process now.

    Private are the anonymous pages of smaps_rollup, shared the RssShmem of status. smaps_rollup's own Private and
    Shared will not do: they count a page of a shared segment as private while one process alone maps it.
    """
    private = _kilobytes(proc / "smaps_rollup", "Anonymous")
    shared = _kilobytes(proc / "status", "RssShmem")
    return Memory(private_nbytes=private * 1024, shared_nbytes=shared * 1024)


def process_age_s(proc: Path = _PROC) -> float:
    """Return how long ago this process was started, in seconds; the kernel counts hundredths."""
    # Behind the command name, which may hold anything but ends at the last bracket, field 22 is the start time.
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0
