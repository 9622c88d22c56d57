"""Where a store lies: the kind of file system, direct reads, how fast they are. Pure checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertd.doctor.findings import Finding, note, ok

_SLOW_BYTES_PER_S = 0.3e9
_REMOTE = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "9p", "afs", "lustre", "gpfs", "beegfs", "glusterfs",
    "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "virtiofs",
})  # fmt: skip
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes a second, with one reader and with several; `is_direct`: past the page cache."""

    one_bytes_per_s: float
    many_bytes_per_s: float
    n_readers: int
    is_direct: bool


def file_system_of(path: Path, mountinfo: str) -> str | None:
    """Return the kind of file system that a resolved path lies on: that of the deepest mount, the latest if two."""
    found, depth = None, -1
    for line in mountinfo.splitlines():
        mount, _, file_system = line.partition(" - ")
        point = Path(mount.split()[4].replace(r"\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = file_system.split()[0], len(point.parts)
    return found


def check_file_system(kind: str | None) -> Finding:
    """Say whether a store's files are near."""
    name = "file system"
    if kind is None:
        return ok(name, "unknown")
    if kind in _REMOTE:
        return note(name, f"{kind}: over a network", "copy the store to a local disk; a broken network is a read error")
    if kind in _IN_MEMORY:
        return note(name, f"{kind}: in memory, so that the store takes it twice", "move the store to a disk")
    return ok(name, kind)


def check_disk(speed: DiskSpeed | None, store_nbytes: int, token_nbytes: int) -> Sequence[Finding]:
    """Say how fast a store is read; `token_nbytes` is what the experts of one token are together."""
    if speed is None:
        return [note("disk", "the store's files could not be read", "`expertd verify STORE` says more")]
    best = max(speed.one_bytes_per_s, speed.many_bytes_per_s)
    found = (
        f"{speed.one_bytes_per_s / 1e9:.2f} GB/s with one reader, {speed.many_bytes_per_s / 1e9:.2f} with "
        f"{speed.n_readers}: loading takes {store_nbytes / best:.1f} s, a token of which no expert is in memory "
        f"{token_nbytes / best:.2f} s"
    )
    if best < _SLOW_BYTES_PER_S:
        speed_finding = note("disk", found, "a faster disk; once a store is in memory it does not matter")
    else:
        speed_finding = ok("disk", found)
    return [speed_finding, _check_direct(is_direct=speed.is_direct)]


def _check_direct(*, is_direct: bool) -> Finding:
    if is_direct:
        return ok("direct reads", "possible (O_DIRECT)")
    remedy = "none is needed; the page cache is emptied after each read instead"
    return note("direct reads", "not on this file system: what is read passes through the page cache", remedy)
