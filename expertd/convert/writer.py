"""The files of a store under construction: records at their planned places, then side files, the manifest last.

The converter creates the files, syncs them and writes the rest; its workers fill in the records, any of them at any
time, as no two records share a byte. Knows no tensors: a record comes as bytes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.convert.errors import WriteFailed
from expertd.convert.plan import PlannedFile
from expertd.convert.staging import disk_errors, sync_directory


class RecordFiles:
    """The record files of one store, open for writing. `target` is where the store will stand, for error lines only."""

    def __init__(self, folder: Path, target: Path, names: Iterable[str], *, flags: int = 0) -> None:
        self._target = target
        self._fds: dict[str, int] = {}
        with ExitStack() as opened, disk_errors(target):
            for name in names:
                fd = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
                opened.callback(os.close, fd)
                self._fds[name] = fd
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def write(self, file: str, offset: int, data: bytes | bytearray) -> None:
        """Write bytes at their place; raise NoDiskSpace or WriteFailed."""
        with disk_errors(self._target):
            _write_all(self._fds[file], data, offset)

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """Return bytes that were written; raise WriteFailed."""
        with disk_errors(self._target):
            data = bytearray()
            while len(data) < nbytes:
                piece = os.pread(self._fds[file], nbytes - len(data), offset + len(data))
                if not piece:
                    raise WriteFailed(f"{self._target}: {file} became shorter while it was written")
                data += piece
            return bytes(data)

    def sync(self, file: str) -> None:
        """Make a file durable, whoever wrote it; raise NoDiskSpace or WriteFailed."""
        with disk_errors(self._target):
            os.fsync(self._fds[file])


@contextmanager
def record_files_with_headers(folder: Path, target: Path, files: tuple[PlannedFile, ...]) -> Iterator[RecordFiles]:
    """Yield the files with their headers, made unless a run before made them; raise NoDiskSpace or WriteFailed."""
    with RecordFiles(folder, target, [file.name for file in files], flags=os.O_CREAT) as record_files:
        for file in files:
            record_files.write(file.name, 0, file.header)
        yield record_files


def write_file(folder: Path, target: Path, name: str, data: bytes) -> None:
    """Write a whole file durably; raise NoDiskSpace or WriteFailed."""
    with disk_errors(target):
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(folder)


def _write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        n_written = os.pwrite(fd, rest, offset)
        rest = rest[n_written:]
        offset += n_written
