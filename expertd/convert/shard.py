"""Where a tensor's bytes lie in a checkpoint, and reading them: by pread, never mapped, so that a file cut under us is
an error line and no SIGBUS.

A shard is opened for each read and not held: one that is deleted after its use gives its disk space back at once, and
one that was replaced since its header was read is noticed. Knows no models.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from expertd.convert.errors import CheckpointError
from expertd.convert.safetensors_header import TensorSlot


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its name in the checkpoint's folder, its length, and what tells its content from another's.

    `mtime_ns` is None for a file that was not on this disk yet when its header was read, `etag` for one that was.
    """

    name: str
    nbytes: int
    mtime_ns: int | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The shard that a tensor lies in, and its place there."""

    shard: Shard
    slot: TensorSlot


def shard_of_file(name: str, fd: int) -> Shard:
    """Return the shard that an open file is."""
    status = os.fstat(fd)
    return Shard(name, status.st_size, mtime_ns=status.st_mtime_ns)


def read_tensor(path: Path, place: TensorPlace, name: str, *, begin: int = 0, nbytes: int | None = None) -> bytearray:
    """Return a tensor's bytes, or `nbytes` of them from `begin`; raise CheckpointError naming the tensor."""
    data = bytearray(place.slot.nbytes - begin if nbytes is None else nbytes)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        _fill(fd, data, place.slot.offset + begin, name)
        _check_unchanged(fd, path, place.shard)
    finally:
        os.close(fd)
    return data


def _fill(fd: int, data: bytearray, offset: int, name: str) -> None:
    rest = memoryview(data)
    while rest:
        try:
            n_read = os.preadv(fd, [rest], offset)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from None
        if n_read == 0:
            raise CheckpointError(f"{name}: the file became shorter while it was read")
        rest = rest[n_read:]
        offset += n_read


def _check_unchanged(fd: int, path: Path, shard: Shard) -> None:
    status = os.fstat(fd)
    if status.st_size != shard.nbytes or shard.mtime_ns not in {None, status.st_mtime_ns}:
        raise CheckpointError(f"{path}: the checkpoint changed while it was read")
