"""What the daemon itself needs: a place to be met, descriptors, seals, ZeroMQ; and the one that runs. Pure checks."""

import os
from dataclasses import dataclass
from pathlib import Path

from expertd.doctor.findings import Finding, note, ok, problem

_FEW_DESCRIPTORS = 1024
_TOO_FEW_DESCRIPTORS = 64


@dataclass(frozen=True, slots=True)
class Running:
    """The daemon that answered: its pid, its library's version, the digests of its stores that are ready."""

    pid: int
    library_version: str
    ready: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotRunning:
    """Nobody answered, and nobody holds the lock."""


@dataclass(frozen=True, slots=True)
class NotUsable:
    """Somebody is there who cannot be talked to, and why."""

    reason: str


def check_running(daemon: Running | NotRunning | NotUsable, library_version: str) -> Finding:
    """Say which daemon runs, and whether it is of this version."""
    name = "daemon"
    if isinstance(daemon, NotRunning):
        return ok(name, "none runs")
    if isinstance(daemon, NotUsable):
        return problem(name, daemon.reason, "`expertd stop`, or end that process by its pid; then start again")
    found = f"pid {daemon.pid}, version {daemon.library_version}, {len(daemon.ready)} store(s) ready"
    if daemon.library_version != library_version:
        return note(name, f"{found}; this is {library_version}", "`expertd stop`, then start it again")
    return ok(name, found)


def check_runtime_dir(path: Path, reason: str | None, *, vanishes: bool) -> Finding:
    """Say whether the runtime directory is safe (`reason`: why not), and whether it goes when the user logs out."""
    name = "runtime directory"
    if reason is not None:
        return problem(name, reason, "remove it, or set EXPERTD_RUNTIME_DIR to a directory of yours")
    if vanishes:
        remedy = "`loginctl enable-linger` keeps it, or set EXPERTD_RUNTIME_DIR"
        return note(name, f"{path}: it is removed when you log out, and a daemon is then out of reach", remedy)
    return ok(name, str(path))


def check_settings(path: Path, reason: str | None, *, is_there: bool) -> Finding:
    """Say where the daemon's settings come from, and what is wrong with them."""
    if reason is not None:
        return problem("settings", reason, "correct it; configs/expertd.toml explains every option")
    return ok("settings", str(path) if is_there else f"the defaults; {path} would change them")


def check_descriptors(hard_limit: int | None) -> Finding:
    """Say how many files the daemon may open; None is no limit. It raises the soft limit by itself."""
    name = "open files"
    if hard_limit is None:
        return ok(name, "no limit")
    found = f"at most {hard_limit}"
    if hard_limit < _TOO_FEW_DESCRIPTORS:
        return problem(name, found, "raise the hard limit: `ulimit -Hn`, LimitNOFILE")
    if hard_limit < _FEW_DESCRIPTORS:
        remedy = "a session takes one, a store one a GB: raise the hard limit: `ulimit -Hn`, LimitNOFILE"
        return note(name, found, remedy)
    return ok(name, found)


def check_seals(reason: str | None) -> Finding:
    """Say whether sealed memory cannot be changed; `reason`: how it can."""
    if reason is None:
        return ok("seals", "hold: nobody can change a store in memory")
    return problem("seals", reason, "another kernel; on this one a store could be changed under a runner")


def check_libzmq(version: tuple[int, ...], lowest: tuple[int, ...]) -> Finding:
    """Say whether ZeroMQ is new enough."""
    shown = ".".join(map(str, version))
    if version >= lowest:
        return ok("libzmq", shown)
    return problem("libzmq", f"{shown}, {'.'.join(map(str, lowest))} is needed", "`pip install --upgrade pyzmq`")


def is_locked(locks: str, device: int, inode: int) -> bool:
    """Whether /proc/locks lists a flock on that file; of who waits for one, it has an arrow in another column."""
    name = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    rows = (line.split() for line in locks.splitlines())
    return any(len(row) > 5 and row[1] == "FLOCK" and row[5] == name for row in rows)
