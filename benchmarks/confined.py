"""A control group that confines a measured program's memory, version 1 or 2: made, read and removed here.

All that its processes touch first is charged to it: private memory, shared memory and the page cache alike.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import NothingToMeasure

_V1_MOUNT = Path("/sys/fs/cgroup/memory")
_V2_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Version:
    """What the files of one version are called."""

    limit: str
    used: str
    most: str
    cache: str  # in memory.stat: the page cache, shared memory included
    kills: str


_V1 = _Version(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes", "cache", "memory.oom_control"
)
_V2 = _Version("memory.max", "memory.current", "memory.peak", "file", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One group; its figures are of the time since it was made."""

    folder: Path
    version: _Version

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs another one inside the group, its children too."""
        join = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", join, str(self.folder / "cgroup.procs"), *command]

    def limit(self, nbytes: int) -> None:
        """Let it hold no more than that from now on; the kernel refuses less than it cannot do without."""
        (self.folder / self.version.limit).write_text(str(nbytes))

    @property
    def most_nbytes(self) -> int:
        """The most that was charged at once."""
        return int((self.folder / self.version.most).read_text())

    @property
    def own_nbytes(self) -> int:
        """The most that was charged at once beside the page cache and shared memory there is now."""
        return self.most_nbytes - self.cache_nbytes

    def forget_most(self) -> None:
        """Count the most from now on, where the kernel can."""
        with suppress(OSError):
            (self.folder / self.version.most).write_text("0")

    @property
    def cache_nbytes(self) -> int:
        """What is charged now of page cache and shared memory."""
        return _value(self.folder / "memory.stat", self.version.cache)

    @property
    def n_kills(self) -> int:
        """How many processes the kernel killed because the limit could not be kept otherwise."""
        return _value(self.folder / self.version.kills, "oom_kill")


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Yield a new group without a limit; its processes have to be gone at the end. Raise NothingToMeasure."""
    folder, version = _place()
    folder = folder / f"expertd-bench-{os.getpid()}-{name}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NothingToMeasure(f"{folder}: no control group can be made ({error.strerror}); it takes root") from None
    try:
        group = MemoryGroup(folder, version)
        if not (folder / version.limit).exists():
            raise NothingToMeasure(f"{folder}: control groups below {folder.parent} do not control memory")
        yield group
    finally:
        folder.rmdir()


def _place() -> tuple[Path, _Version]:
    """Return the group below which groups are made: this process's own in version 1, the one around it in version 2.

    In version 2 a group that has processes passes no control on.
    """
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            own = _V1_MOUNT / path.lstrip("/")
            return (own if own.is_dir() else _V1_MOUNT), _V1
    path = next((path for _, controllers, path in lines if not controllers), "/")
    own = _V2_MOUNT / path.lstrip("/")
    return (own.parent if own.is_dir() and path != "/" else _V2_MOUNT), _V2


def _value(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        found, _, value = line.partition(" ")
        if found == name:
            return int(value)
    raise NothingToMeasure(f"{path} does not say {name}")
