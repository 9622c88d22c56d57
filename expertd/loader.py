"""From files to sealed segments. Blocks the thread that calls it; the daemon calls it from its loader thread.

Segments are made one after another; inside one, worker threads take memory, read and check records side by side. All
three release the interpreter lock, so the daemon goes on answering.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from expertd.budget import ALL_THERE_IS, MemoryWish, check_fits
from expertd.errors import LoadCancelled, StoreInvalid
from expertd.store import StoreFiles
from protocol.catalogue import Catalogue, encode_catalogue, plan_catalogue
from protocol.fault_points import FaultPoint, reached
from protocol.fdpass import close_all
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.manifest import Record
from protocol.segment import HUGE_PAGE_NBYTES, SegmentBuilder, make_segment

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)

_SLICE_NBYTES = 32 * HUGE_PAGE_NBYTES


class LoadProgress:
    """How far a load is; written by the loader's threads, read by anybody."""

    def __init__(self) -> None:
        self.loaded_nbytes = 0
        self.cancelled = False
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count a record that is in memory."""
        with self._lock:
            self.loaded_nbytes += nbytes


@dataclass(slots=True)
class LoadedStore:
    """The segments of one store. Owns the descriptors: the catalogue's first, then the data segments in order."""

    catalogue: Catalogue
    digest: str
    nbytes: int
    load_s: float
    huge_nbytes: int
    corrupt: tuple[ExpertKey, ...]
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Let the segments go; runners that map them keep them alive."""
        close_all(self.fds)
        self.fds.clear()


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """How to load."""

    n_threads: int
    collapse_budget_s: float


@dataclass(frozen=True, slots=True)
class _Item:
    """One record and where it goes."""

    name: str
    record: Record
    handle: ExpertHandle | DenseHandle


class Loader:
    """Loads one store; made anew for each."""

    def __init__(self, settings: LoaderSettings, available_nbytes: Callable[[], int], progress: LoadProgress) -> None:
        self._settings = settings
        self._available_nbytes = available_nbytes
        self._progress = progress
        self._corrupt: list[ExpertKey] = []
        self._huge_nbytes = 0

    def load(self, path: Path, digest: str, wish: MemoryWish = ALL_THERE_IS) -> LoadedStore:
        """Return the store of that digest as sealed segments; raise StoreInvalid, OutOfMemory or LoadCancelled."""
        start = time.monotonic()
        with StoreFiles(path) as files, ThreadPoolExecutor(self._settings.n_threads, "expertd-load") as pool:
            if files.manifest.digest != digest:
                raise StoreInvalid(f"the store has digest {files.manifest.digest[:12]}, {digest[:12]} was expected")
            catalogue = plan_catalogue(files.manifest)
            check_fits(sum(catalogue.segments_nbytes), wish, self._available_nbytes())
            reached(FaultPoint.DAEMON_FILES_OPENED)
            fds: list[int] = []
            try:
                collapse_until = start + self._settings.collapse_budget_s
                for segment, nbytes in enumerate(catalogue.segments_nbytes):
                    items = [item for item in _items(catalogue) if item.handle.segment == segment]
                    fds.append(self._load_segment(files, pool, nbytes, items, collapse_until))
                catalogue = self._without_corrupt(catalogue)
                fds.insert(0, make_segment("expertd-catalogue", encode_catalogue(catalogue)))
                reached(FaultPoint.DAEMON_SEGMENTS_SEALED)
            except BaseException:
                close_all(fds)
                raise
        return LoadedStore(
            catalogue=catalogue,
            digest=digest,
            nbytes=sum(catalogue.segments_nbytes),
            load_s=time.monotonic() - start,
            huge_nbytes=self._huge_nbytes,
            corrupt=tuple(sorted(self._corrupt)),
            fds=fds,
        )

    def _load_segment(
        self,
        files: StoreFiles,
        pool: ThreadPoolExecutor,
        nbytes: int,
        items: list[_Item],
        collapse_until: float,
    ) -> int:
        with SegmentBuilder("expertd-store", nbytes) as builder:

            def populate(start: int) -> int:
                self._check_wanted()
                stop = min(start + _SLICE_NBYTES, nbytes)
                return builder.populate(start, stop, collapse_until=collapse_until)

            def read(item: _Item) -> None:
                self._check_wanted()
                self._load_record(files, builder.view, item)

            self._huge_nbytes += sum(_run_all(pool, populate, range(0, nbytes, _SLICE_NBYTES)))
            reached(FaultPoint.DAEMON_SEGMENT_POPULATED)
            _run_all(pool, read, items)
            reached(FaultPoint.DAEMON_SEGMENT_FILLED)
            return builder.seal()

    def _load_record(self, files: StoreFiles, view: memoryview, item: _Item) -> None:
        with view[item.handle.offset : item.handle.offset + item.handle.nbytes] as target:
            if not _is_intact(files, item, target):
                if isinstance(item.handle, DenseHandle):
                    raise StoreInvalid(f"{item.name}: its checksum is wrong, and nothing works without it")
                target[:] = bytes(len(target))
                self._corrupt.append(item.handle.key)
                logger.error("expert is corrupt key=%s", item.handle.key)
        files.forget_cached(item.record)
        self._progress.add(item.handle.nbytes)

    def _check_wanted(self) -> None:
        if self._progress.cancelled:
            raise LoadCancelled("the load was cancelled")

    def _without_corrupt(self, catalogue: Catalogue) -> Catalogue:
        corrupt = set(self._corrupt)
        return replace(catalogue, experts={k: handle for k, handle in catalogue.experts.items() if k not in corrupt})


def _run_all(
    pool: ThreadPoolExecutor, work: Callable[[_Argument], _Result], over: Iterable[_Argument]
) -> list[_Result]:
    """Return the results; after a failure no worker is left running, since the memory it fills is about to go."""
    futures = [pool.submit(work, argument) for argument in over]
    _, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    wait(futures)
    failures = [future.exception() for future in futures if not future.cancelled()]
    for failure in failures:
        if failure is not None:
            raise failure
    return [future.result() for future in futures]


def _items(catalogue: Catalogue) -> Iterable[_Item]:
    for name, record in catalogue.manifest.dense.items():
        yield _Item(name, record, catalogue.dense[name])
    for key, record in catalogue.manifest.experts.items():
        yield _Item(str(key), record, catalogue.experts[key])


def _is_intact(files: StoreFiles, item: _Item, target: memoryview) -> bool:
    try:
        reached(FaultPoint.DAEMON_RECORD_READING)
        return files.read_record(item.record, target)
    except OSError as error:
        logger.error("record cannot be read name=%s error=%s", item.name, error)  # noqa: TRY400 - the cause is said
        return False
