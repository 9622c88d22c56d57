"""How a directory appears whole or not at all: built beside its place under another name, then renamed.

`.STORE.partial-XXXX` is where a run works, `.STORE.old-XXXX` what is being replaced. The process that works on one
holds a flock on it, which the kernel drops when the process dies, so that the next run knows what to go on with or to
clear away. A working folder holds `store`, which is what is being built and moves to its place, `made-of`, which says
of what it is made, and what else its owner puts there. Knows no file of a store but its manifest.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from expertd.convert.errors import NoDiskSpace, NotAStore, StoreExists, WriteFailed
from expertd.convert.side_files import SIDE_FILES_NBYTES_MAX
from protocol.manifest import DENSE_FILE, MANIFEST_FILE, MANIFEST_NBYTES_MAX

_STORE_FILE = re.compile(r"experts-\d{5,}\.safetensors\Z")
_BUILT = "store"
_MADE_OF = "made-of"
_MADE_OF_NBYTES_MAX = 1 << 10


class Staging:
    """One directory being built for `target`: `path` is it, `folder` the working folder around it.

    Leaving the block uncommitted removes both, unless `keeps` was set: then a run that makes the same finds them again,
    and `is_resumed` says so.
    """

    def __init__(self, target: Path, folder: Path, *, is_resumed: bool) -> None:
        self.target = target
        self.folder = folder
        self.path = folder / _BUILT
        self.is_resumed = is_resumed
        self.keeps = is_resumed
        self._is_committed = False

    @property
    def is_kept(self) -> bool:
        """Whether the working folder stays when the block is left."""
        return self.keeps and not self._is_committed

    def commit(self, *, force: bool) -> None:
        """Put the directory in its place, which must be free or, with force, a store; raise StoreExists or NotAStore.

        Everything in it must be synced. There is no moment at which the place holds anything but a whole store; with
        force there is one at which it holds nothing, and a run that dies then is repaired by the next.
        """
        check_target(self.target, force=force)
        with disk_errors(self.target):
            sync_directory(self.path)
            if self.target.exists():
                self._replace()
            else:
                self._move_in()
            self._is_committed = True
            sync_directory(self.target.parent)

    def _replace(self) -> None:
        with _locked(self.target) as is_ours:
            if not is_ours:
                raise StoreExists(f"{self.target}: is being replaced by another run")
            old = _sibling(self.target, "old")
            self.target.rename(old)
            try:
                self._move_in()
            except BaseException:
                old.rename(self.target)
                raise
            # The new store is in its place: what cannot be removed now is removed by the next run.
            shutil.rmtree(old, ignore_errors=True)

    def _move_in(self) -> None:
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise StoreExists(f"{self.target}: appeared while it was being made") from None
            raise


@contextmanager
def staged(target: Path, *, force: bool, made_of: str | None = None) -> Iterator[Staging]:
    """Yield a directory beside the target: one that a dead run made of the same, if any, else a fresh one.

    `made_of` says of what; None is like nothing else.
    """
    with ExitStack() as held:
        with disk_errors(target):
            folder = _clear_dead(target, made_of, held)
            is_resumed = folder is not None
            check_target(target, force=force)
            folder = folder or _create(target, made_of, held)
        staging = Staging(target, folder, is_resumed=is_resumed)
        try:
            yield staging
        finally:
            if not staging.is_kept:
                shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, *, force: bool) -> None:
    """Raise unless the target is free or, with force, a store and nothing else: StoreExists, NotAStore, WriteFailed."""
    with disk_errors(target):
        if not target.parent.is_dir():
            raise WriteFailed(f"{target}: its directory {target.parent} does not exist")
        if os.path.lexists(target):
            if not force:
                raise StoreExists(f"{target}: exists already; --force replaces a store")
            _check_is_store(target)


def kept_nbytes(target: Path, made_of: str) -> int:
    """Return how much disk is taken already by what a run that made the same has kept beside the target."""
    with disk_errors(target):
        kept = [path for path in _siblings(target, "partial") if _made_of(path) == made_of]
        return sum(file.stat().st_blocks * 512 for path in kept for file in (path / _BUILT).iterdir())


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn an OSError inside the block into NoDiskSpace or WriteFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoDiskSpace(f"{target}: the file system became full ({error.strerror})") from None
        raise WriteFailed(f"{target}: cannot be written ({error.strerror or error})") from None


def sync_directory(path: Path) -> None:
    """Make the names in a directory as durable as their files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_is_store(target: Path) -> None:
    if not target.is_dir() or not _has_manifest(target):
        raise NotAStore(f"{target}: is no store, so --force does not replace it; choose another place or remove it")
    for path in sorted(target.iterdir()):
        if not _is_store_file(path):
            raise NotAStore(
                f"{target}: holds {path.name!r:.100}, which is no part of a store, so --force does not replace it"
            )


def _has_manifest(target: Path) -> bool:
    """Return whether the directory has a store's manifest, of whatever format version."""
    path = target / MANIFEST_FILE
    if not path.is_file() or path.stat().st_size > MANIFEST_NBYTES_MAX:
        return False
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"format_version", "digest"} <= set(document)


def _is_store_file(path: Path) -> bool:
    names = {MANIFEST_FILE, DENSE_FILE, *SIDE_FILES_NBYTES_MAX}
    return path.is_file() and (path.name in names or _STORE_FILE.match(path.name) is not None)


def _create(target: Path, made_of: str | None, held: ExitStack) -> Path:
    """Return a new folder beside the target, locked while held. Before the flock another run may take it for dead."""
    while True:
        path = _sibling(target, "partial")
        path.mkdir()
        fd = _lock(path)
        if fd is None:
            continue
        if not path.exists():
            os.close(fd)
            continue
        held.callback(os.close, fd)
        (path / _BUILT).mkdir()
        # Last: a folder without it is never gone on with.
        (path / _MADE_OF).write_text(made_of or "")
        return path


def _clear_dead(target: Path, made_of: str | None, held: ExitStack) -> Path | None:
    """Remove what dead runs left beside the target, but for one that made the same: return it, locked while held.

    A store that one had only moved aside goes back to its place.
    """
    for path in _siblings(target, "old"):
        with _locked(path) as is_ours:
            if is_ours and not os.path.lexists(target):
                path.rename(target)
            elif is_ours:
                shutil.rmtree(path)
    adopted = None
    for path in _siblings(target, "partial"):
        with ExitStack() as lock:
            fd = _lock(path)
            if fd is None:
                continue
            lock.callback(os.close, fd)
            if adopted is None and made_of is not None and _made_of(path) == made_of:
                adopted = path
                held.push(lock.pop_all())
            else:
                shutil.rmtree(path)
    return adopted


def _made_of(folder: Path) -> str | None:
    """Return what a dead run's folder says it is made of, None for one that cannot be gone on with."""
    path = folder / _MADE_OF
    if not (folder / _BUILT).is_dir() or not path.is_file() or path.stat().st_size > _MADE_OF_NBYTES_MAX:
        return None
    return path.read_text(errors="replace")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yield whether the directory is ours for the length of the block: it is there and no living run works on it."""
    fd = _lock(path)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def _lock(path: Path) -> int | None:
    """Return an fd that holds the directory's flock, None if it is gone, not a directory of ours, or held."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def _siblings(target: Path, role: str) -> list[Path]:
    name = re.compile(re.escape(f".{target.name}.{role}-") + r"[0-9a-f]{8}\Z")
    return sorted(path for path in target.parent.iterdir() if name.match(path.name))
