"""How fast a store's files are read: a short trial past the page cache, with one reader and with several.

Blocks its caller for at most two trials and one chunk.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from expertd.doctor.place import DiskSpeed

N_READERS = 8
TRIAL_S = 0.7
_CHUNK_NBYTES = 4 << 20
_PAGE_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class FilePart:
    """A stretch of a file that may be read; offset and length are multiples of a page."""

    path: Path
    offset: int
    nbytes: int


class _Chunks:
    """Which chunk is read next, each once; any thread may ask."""

    def __init__(self, chunks: Sequence[tuple[int, int, int]]) -> None:
        self._chunks = iter(chunks)
        self._lock = threading.Lock()

    def next(self) -> tuple[int, int, int] | None:
        """Return descriptor, offset and length; None if all were read."""
        with self._lock:
            return next(self._chunks, None)


def measure(parts: Sequence[FilePart], clock: Callable[[], float] = time.monotonic) -> DiskSpeed | None:
    """Return how fast those parts are read, None if they cannot be."""
    with ExitStack() as stack:
        try:
            fds, is_direct = _open_all(parts, stack)
            chunks = [
                (fd, start, min(_CHUNK_NBYTES, part.offset + part.nbytes - start))
                for fd, part in zip(fds, parts, strict=True)
                for start in range(part.offset, part.offset + part.nbytes, _CHUNK_NBYTES)
            ]
            # Each trial has a half of its own: what lies beside what was read may be in some cache of the disk's.
            half = (len(chunks) + 1) // 2
            one = _trial(chunks[:half], 1, clock)
            many = _trial(chunks[half:] or chunks, N_READERS, clock)
        except OSError:
            return None
    return None if one is None or many is None else DiskSpeed(one, many, N_READERS, is_direct)


def _open_all(parts: Sequence[FilePart], stack: ExitStack) -> tuple[list[int], bool]:
    """Return a descriptor for each part, and whether they pass by the page cache."""
    paths = list(dict.fromkeys(part.path for part in parts))
    is_direct = bool(paths) and _takes_direct(paths[0])
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
    fds: dict[Path, int] = {}
    for path in paths:
        fds[path] = os.open(path, flags)
        stack.callback(os.close, fds[path])
        os.posix_fadvise(fds[path], 0, 0, os.POSIX_FADV_DONTNEED)
    return [fds[part.path] for part in parts], is_direct


def _takes_direct(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, _PAGE_NBYTES) as buffer:  # some file systems open it so, and refuse to read
            os.preadv(fd, [buffer], 0)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def _trial(chunks: Sequence[tuple[int, int, int]], n_readers: int, clock: Callable[[], float]) -> float | None:
    """Return the bytes a second that so many readers read, None if there was nothing to read."""
    waiting = _Chunks(chunks)
    start = clock()
    with ThreadPoolExecutor(n_readers) as pool:
        read = list(pool.map(lambda _: _read_until(waiting, start + TRIAL_S, clock), range(n_readers)))
    return sum(read) / max(clock() - start, 1e-9) if sum(read) else None


def _read_until(chunks: _Chunks, deadline: float, clock: Callable[[], float]) -> int:
    nbytes = 0
    with mmap.mmap(-1, _CHUNK_NBYTES) as buffer, memoryview(buffer) as view:
        while clock() < deadline and (chunk := chunks.next()) is not None:
            fd, offset, length = chunk
            with view[:length] as target:
                nbytes += os.preadv(fd, [target], offset)
    return nbytes
