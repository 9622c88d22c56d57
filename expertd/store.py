"""A store on disk: its manifest and its files, opened safely. Reads records; knows neither memory nor messages.

The directory may have been made by anybody: the manifest is bounded and checked by `protocol.manifest`, files are
opened without following links, and every record must lie inside its file before the first one is read.
"""

import errno
import hashlib
import logging
import os
import stat
from pathlib import Path
from types import TracebackType

import xxhash

from expertd.errors import StoreInvalid
from protocol.errors import ManifestError
from protocol.layout import PAGE_NBYTES
from protocol.manifest import MANIFEST_FILE, MANIFEST_NBYTES_MAX, Manifest, Record, SideFile, load_manifest

logger = logging.getLogger(__name__)

_READ_NBYTES = 8 << 20
_PATH_NBYTES_MAX = 1024
# A file holds up to 1 GiB of records, and every one stays open while the store is read.
_DATA_FILES_MAX = 512


class Checksum:
    """The checksum of a record whose bytes come one piece after the other. Lets other threads run meanwhile."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, piece: memoryview) -> None:
        """Go on with the next bytes."""
        self._hash.update(piece)

    def hexdigest(self) -> str:
        """Return the checksum of all bytes so far, as a manifest has it."""
        return self._hash.hexdigest()


class StoreFiles:
    """The open files of one store; a context manager. `read_record` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Open the store in that directory; raise StoreInvalid."""
        self._fds: dict[str, int] = {}
        self._direct_fds: dict[str, int] = {}
        self._directory = _open_directory(path)
        try:
            self.manifest = _read_manifest(self._directory)
            for record in (*self.manifest.dense.values(), *self.manifest.experts.values()):
                self._check_inside_file(record)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StoreFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; to be called once."""
        for fd in {self._directory, *self._fds.values(), *self._direct_fds.values()}:
            os.close(fd)

    def read_record(self, record: Record, target: memoryview) -> bool:
        """Fill the target with the record's bytes; return whether they match their checksum.

        A wrong checksum is read once more past the page cache: memory rots more often than disks. Raises OSError.
        """
        fd = self._fds[record.file]
        for _ in range(2):
            _read_exactly(fd, target, record.offset)
            if is_intact(record, target):
                return True
            os.posix_fadvise(fd, record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)
        return False

    def read_piece(self, record: Record, start: int, target: memoryview) -> None:
        """Fill the target from byte `start` of a record on, leaving no copy in the page cache; raise OSError."""
        fd = self._direct_fd(record.file)
        try:
            _read_exactly(fd, target, record.offset + start)
        except OSError as error:
            if error.errno != errno.EINVAL or fd == self._fds[record.file]:
                raise
            # This file system or disk wants other alignment than a record has.
            logger.info("reading through the page cache file=%s", record.file)
            self._direct_fds[record.file] = self._fds[record.file]
            _read_exactly(self._fds[record.file], target, record.offset + start)

    def forget_cached(self, record: Record) -> None:
        """Let the kernel drop its cached copy of a record that memory now holds."""
        os.posix_fadvise(self._fds[record.file], record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)

    def side_file_matches(self, side_file: SideFile) -> bool:
        """Return whether a file that holds no records is what the manifest says."""
        try:
            fd = _open_file(self._directory, side_file.name)
        except StoreInvalid:
            return False
        with os.fdopen(fd, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest == side_file.sha256

    def open_direct(self) -> None:
        """Open every file a second time, past the page cache, where its file system can do that."""
        for name, fd in self._fds.items():
            try:
                # The very file that was opened and checked, whatever bears its name by now.
                self._direct_fds[name] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                logger.info("reading through the page cache file=%s reason=%s", name, error.strerror)
                self._direct_fds[name] = fd

    def _direct_fd(self, name: str) -> int:
        return self._direct_fds.get(name, self._fds[name])

    def _check_inside_file(self, record: Record) -> None:
        if record.file not in self._fds:
            if len(self._fds) >= _DATA_FILES_MAX:
                raise StoreInvalid(f"{MANIFEST_FILE}: records in more than {_DATA_FILES_MAX} files")
            self._fds[record.file] = _open_file(self._directory, record.file)
        size = os.fstat(self._fds[record.file]).st_size
        if record.offset + record.nbytes > size:
            raise StoreInvalid(
                f"{record.file}: {size} bytes, at least {record.offset + record.nbytes} are expected; "
                "the file was cut, make the store again"
            )


def is_intact(record: Record, data: memoryview) -> bool:
    """Return whether those are the record's bytes."""
    return bool(xxhash.xxh3_128_hexdigest(data) == record.xxh3_128)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the store in that directory; raise StoreInvalid."""
    directory = _open_directory(path)
    try:
        return _read_manifest(directory)
    finally:
        os.close(directory)


def path_problem(path: str) -> str | None:
    """Return why a store at that path cannot be held, None if it can: every status has to carry the path."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "the path is not UTF-8"
    if len(encoded) > _PATH_NBYTES_MAX or b"\0" in encoded:
        return f"the path is longer than {_PATH_NBYTES_MAX} bytes or holds a zero byte"
    return None


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreInvalid(f"{path}: no such store") from None
    except OSError as error:
        raise StoreInvalid(f"{path}: a store directory was expected ({error.strerror})") from None
    except ValueError:
        raise StoreInvalid("a path with a zero byte names no store") from None


def _read_manifest(directory: int) -> Manifest:
    fd = _open_file(directory, MANIFEST_FILE)
    with os.fdopen(fd, "rb") as file:
        data = file.read(MANIFEST_NBYTES_MAX + 1)
    try:
        return load_manifest(data)
    except ManifestError as error:
        raise StoreInvalid(str(error)) from None


def _open_file(directory: int, name: str) -> int:
    try:
        # Looked at before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise StoreInvalid(f"{name}: a regular file was expected; links are not followed")
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        raise StoreInvalid(f"{name}: missing; this is no store, or an incomplete one") from None
    except OSError as error:
        raise StoreInvalid(f"{name}: cannot be opened ({error.strerror})") from None


def _read_exactly(fd: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        n = os.preadv(fd, [target[done : done + _READ_NBYTES]], offset + done)
        done += n
        # Past the page cache a read that ends inside a page has met the end of the file.
        if n == 0 or (done < len(target) and n % PAGE_NBYTES):
            raise OSError(f"the file ends at byte {offset + done}, {offset + len(target)} were expected")
