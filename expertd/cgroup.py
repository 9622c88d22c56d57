"""What the control groups of this process leave it of memory, version 1 or 2. Reads files; knows nothing of the daemon.

In a container, a unit or a batch job MemAvailable is the machine's, and the group's own limit is what kills. Every
level above the process may have one; the least counts. What a group holds of the page cache can be given back, so it
counts as available; shared memory cannot.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Version 1 writes a number near 2^63 for "no limit".
_NO_LIMIT_NBYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A group that has a limit, and what is used of it."""

    folder: Path
    limit_nbytes: int
    used_nbytes: int
    cache_nbytes: int

    @property
    def available_nbytes(self) -> int:
        """What may still be taken; 0 if more is used than allowed."""
        return max(0, self.limit_nbytes - max(0, self.used_nbytes - self.cache_nbytes))


@dataclass(frozen=True, slots=True)
class _Version:
    """What the files of one version of control groups are called."""

    file_system: str
    limits: tuple[str, ...]
    used: str
    cache_prefix: str


_V1 = _Version("cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
# Above memory.high a group that cannot swap its shared memory is slowed down to a standstill: a limit, too.
_V2 = _Version("cgroup2", ("memory.max", "memory.high"), "memory.current", "")


@dataclass(frozen=True, slots=True)
class _Level:
    """The open files of one group."""

    folder: Path
    version: _Version
    limit_fds: tuple[int, ...]
    used_fd: int
    stat_fd: int

    def read(self) -> GroupMemory | None:
        """Return what the group holds, None if it has no limit or is gone."""
        try:
            limits = [_limit(os.pread(fd, 64, 0)) for fd in self.limit_fds]
            used_nbytes = int(os.pread(self.used_fd, 64, 0))
            cache_nbytes = _cache(os.pread(self.stat_fd, 1 << 16, 0), self.version.cache_prefix)
        except OSError:
            return None
        limit_nbytes = min(limits)
        if limit_nbytes >= _NO_LIMIT_NBYTES:
            return None
        return GroupMemory(self.folder, limit_nbytes, used_nbytes, cache_nbytes)


class GroupMeter:
    """The groups of this process, through files opened once: with no descriptor left it goes on. To be closed once."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._levels: list[_Level] = []
        for version in (_V1, _V2):
            for folder in _folders(proc, version):
                with suppress(OSError):  # a level without these files has no limit: the root, or another controller
                    self._levels.append(_open(folder, version))

    def close(self) -> None:
        """Close the files."""
        for level in self._levels:
            for fd in (*level.limit_fds, level.used_fd, level.stat_fd):
                os.close(fd)

    def groups(self) -> list[GroupMemory]:
        """Return the groups that have a limit, the innermost first."""
        read = [level.read() for level in self._levels]
        return [group for group in read if group is not None]

    def available_nbytes(self) -> int | None:
        """Return what may still be taken, None if no group has a limit."""
        return min((group.available_nbytes for group in self.groups()), default=None)


def memory_groups(proc: Path = Path("/proc/self")) -> list[GroupMemory]:
    """Return the groups of this process that have a limit, the innermost first."""
    meter = GroupMeter(proc)
    try:
        return meter.groups()
    finally:
        meter.close()


def _folders(proc: Path, version: _Version) -> list[Path]:
    """Return where this process's group and those above it are mounted, the innermost first."""
    try:
        group = _own_group((proc / "cgroup").read_text(), version)
        mount = _mount((proc / "mountinfo").read_text(), version)
    except OSError:
        return []
    if group is None or mount is None:
        return []
    root, mounted_at = mount
    # A container may see its own group as the root, wherever that lies in the machine's tree.
    below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else PurePosixPath()
    innermost = mounted_at / below
    return [innermost, *list(innermost.parents)[: len(below.parts)]]


def _own_group(text: str, version: _Version) -> PurePosixPath | None:
    for line in text.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        is_v2 = hierarchy == "0" and not controllers
        if is_v2 if version is _V2 else "memory" in controllers.split(","):
            return PurePosixPath(path)
    return None


def _mount(text: str, version: _Version) -> tuple[PurePosixPath, Path] | None:
    """Return which group is the root of the mount, and where it is mounted."""
    for line in text.splitlines():
        mount, _, file_system = line.partition(" - ")
        fields, (kind, _source, options) = mount.split(), file_system.split(None, 2)
        if kind == version.file_system and (version is _V2 or "memory" in options.split(",")):
            return PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4]))
    return None


def _unescaped(path: str) -> str:
    r"""Return a path of mountinfo with its \040 and the like as the characters they are."""
    return path.encode("latin-1", "backslashreplace").decode("unicode_escape") if "\\" in path else path


def _open(folder: Path, version: _Version) -> _Level:
    fds: list[int] = []
    try:
        for name in (*version.limits, version.used, "memory.stat"):
            fds.append(os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401 - closed if a later one fails
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    return _Level(folder, version, tuple(fds[:-2]), fds[-2], fds[-1])


def _limit(text: bytes) -> int:
    word = text.strip()
    return _NO_LIMIT_NBYTES if word == b"max" else int(word)


def _cache(text: bytes, prefix: str) -> int:
    names = {f"{prefix}inactive_file".encode(), f"{prefix}active_file".encode()}
    rows = (line.split() for line in text.splitlines())
    return sum(int(row[1]) for row in rows if row and row[0] in names)
