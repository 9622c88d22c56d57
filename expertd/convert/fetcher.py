"""The process that fetches shards from the Hub, one after the other, while others work on those that are here.

A shard grows in a file beside its place, so that the next run goes on where a killed one was; it is moved to its place
when its checksum is the Hub's. The end of its input ends it, so that it does not outlive the converter.
"""

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from threading import Thread

from expertd.convert.errors import ConvertError, FetchFailed
from expertd.convert.fetch_messages import Fetched, FetchJob, FetchProgress, FetchTrouble, load_fetch_job, load_shard
from expertd.convert.hub import Hub, HubFile, Repository
from expertd.convert.staging import disk_errors, sync_directory
from expertd.convert.worker_messages import Event, Failed, dump_event

_READ_NBYTES = 4 << 20
_TELL_EVERY_S = 0.3


def main(job_text: str) -> None:
    """Fetch the shards that come on standard input, until one fails; the input's end is the process's at any time."""
    events = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not stand among the events
    try:
        job = load_fetch_job(job_text)
        hub = Hub(job.endpoint, say=lambda line: _tell(events, FetchTrouble(line)))
        lines: Queue[str] = Queue()
        Thread(target=_listen, args=(lines,), daemon=True).start()
        while True:
            shard = load_shard(lines.get())
            file = HubFile(shard.name, shard.nbytes, shard.etag or "")
            _tell(events, _fetch(hub, job, file, lambda progress: _tell(events, progress)))
    except ConvertError as error:
        _tell(events, Failed(type(error).__name__, str(error)))
    except ConnectionError:
        pass  # the converter is gone


def _listen(lines: "Queue[str]") -> None:
    """Take down what is asked for, in a thread of its own: who waits for the network hears no end of input."""
    with suppress(OSError):  # the converter's end is a reset where it was killed before it had read all it was told
        for line in sys.stdin:
            lines.put(line)
    os._exit(0)


def _fetch(hub: Hub, job: FetchJob, file: HubFile, tell: Callable[[FetchProgress], None]) -> Fetched:
    repository = Repository(job.repo_id, job.commit)
    cached = hub.cached(repository, file)
    if cached is not None:
        return Fetched(file.name, str(cached), is_ours=False)
    if job.folder is None:
        _fetch_to(hub, repository, file, hub.blob_path(repository, file), tell)
        return Fetched(file.name, hub.link(repository, file), is_ours=False)
    path = Path(job.folder) / file.name
    _fetch_to(hub, repository, file, path, tell)
    return Fetched(file.name, str(path), is_ours=True)


def _fetch_to(
    hub: Hub, repository: Repository, file: HubFile, path: Path, tell: Callable[[FetchProgress], None]
) -> None:
    """Have the file at its place, whole and durable; raise ConvertError."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.expertd-part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_file(part) as fd:
        # Another run may have fetched it while we waited for the lock.
        if path.exists():
            return
        for is_last in (False, True):
            _append(hub, repository, file, fd, tell)
            if _etag_of(fd, file) == file.etag:
                break
            with disk_errors(path):
                os.ftruncate(fd, 0)
            if is_last:
                raise FetchFailed(f"{repository.repo_id}: {file.name}: twice its bytes were not those the Hub promises")
        with disk_errors(path):
            os.fsync(fd)
            part.rename(path)
            sync_directory(path.parent)


def _append(hub: Hub, repository: Repository, file: HubFile, fd: int, tell: Callable[[FetchProgress], None]) -> None:
    """Fetch what the file lacks of its length."""
    here = os.fstat(fd).st_size
    if here > file.nbytes:
        os.ftruncate(fd, 0)
        here = 0
    told_at = time.monotonic()
    for offset, chunk in hub.chunks(repository, file.name, here, file.nbytes):
        with disk_errors(Path(file.name)):
            _write_at(fd, chunk, offset)
        if time.monotonic() - told_at > _TELL_EVERY_S:
            told_at = time.monotonic()
            tell(FetchProgress(file.name, offset + len(chunk)))


def _write_at(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        n_written = os.pwrite(fd, rest, offset)
        rest = rest[n_written:]
        offset += n_written


def _etag_of(fd: int, file: HubFile) -> str:
    """Return the etag that the bytes have: sha256 where the Hub gives one of its length, else git's sha1 of a blob."""
    digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.nbytes)  # noqa: S324  # git's
    offset = 0
    while data := os.pread(fd, _READ_NBYTES, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


@contextmanager
def _locked_file(path: Path) -> Iterator[int]:
    """Yield an fd of the file, made if need be, that no other run writes meanwhile."""
    while True:
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Whoever held the lock may have moved the file to its place: then ours has no name any more.
            if not path.exists() or not os.path.samestat(os.fstat(fd), path.stat()):
                continue
            yield fd
            return
        finally:
            os.close(fd)


def _tell(events: int, event: Event) -> None:
    os.write(events, dump_event(event))
