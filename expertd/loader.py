"""From files to sealed segments. Blocks the thread that calls it; the daemon calls it from its loader thread.

Segments are made one after another; inside one, worker threads take memory, read and check records side by side. All
three release the interpreter lock, so the daemon goes on answering.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from expertd.budget import ALL_THERE_IS, MemoryWish, TierPlan, plan_memory
from expertd.errors import LoadCancelled, StoreInvalid
from expertd.holders import segment_name
from expertd.slot_memory import SlotMemory
from expertd.store import StoreFiles
from expertd.tiered import TieredStore
from protocol.catalogue import Catalogue, encode_catalogue, plan_catalogue, plan_tiered_catalogue, with_slots
from protocol.fault_points import FaultPoint, reached
from protocol.fdpass import close_all
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.manifest import Manifest, Record
from protocol.segment import HUGE_PAGE_NBYTES, SegmentBuilder, make_segment
from protocol.slot_table import SlotArea

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

OpenTiered = Callable[[Catalogue, StoreFiles, SlotMemory, Collection[ExpertKey]], TieredStore]

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


@dataclass(frozen=True, slots=True)
class SealedPart:
    """What is sealed of a store with slots, found with somebody and proven; slots are made anew beside it.

    Owns the descriptors of the sealed segments, in order. The catalogue is that of who had it, its slots included.
    """

    catalogue: Catalogue
    fds: list[int]

    @property
    def nbytes(self) -> int:
        """The bytes of its segments."""
        return sum(self.catalogue.segments_nbytes[: self.catalogue.n_sealed])

    def close(self) -> None:
        """Let the segments go, unless somebody took them."""
        close_all(self.fds)
        self.fds.clear()

    def take(self) -> list[int]:
        """Return the descriptors, which are the caller's from here on."""
        fds = self.fds.copy()
        self.fds.clear()
        return fds


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
    tiered: TieredStore | None = None  # of a store that is larger than its memory
    sealed_fds: list[int] = field(init=False)  # those of them that another daemon could go on with

    def __post_init__(self) -> None:
        is_all = self.catalogue.slots is None
        self.sealed_fds = self.fds if is_all else self.fds[: 1 + self.catalogue.n_sealed]

    def close(self) -> None:
        """Let the segments go; runners that map them keep them alive."""
        close_all(self.fds)
        self.fds.clear()
        self.sealed_fds.clear()


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


@dataclass(frozen=True, slots=True)
class _Work:
    """What the steps of one load share."""

    files: StoreFiles
    pool: ThreadPoolExecutor
    collapse_until: float


class Loader:
    """Loads one store; made anew for each. `open_tiered` puts a store to work that is larger than its memory."""

    def __init__(
        self,
        settings: LoaderSettings,
        available_nbytes: Callable[[], int],
        progress: LoadProgress,
        open_tiered: OpenTiered,
    ) -> None:
        self._settings = settings
        self._open_tiered = open_tiered
        self._available_nbytes = available_nbytes
        self._progress = progress
        self._corrupt: list[ExpertKey] = []
        self._huge_nbytes = 0

    def load(
        self, path: Path, digest: str, wish: MemoryWish = ALL_THERE_IS, sealed: SealedPart | None = None
    ) -> LoadedStore:
        """Return the store of that digest as sealed segments; raise StoreInvalid, OutOfMemory or LoadCancelled.

        `sealed` is owned from here on. Where the store is to be held as whoever had it did, only slots are made.
        """
        start = time.monotonic()
        with ExitStack() as stack, ThreadPoolExecutor(self._settings.n_threads, "expertd-load") as pool:
            fds: list[int] = []
            stack.callback(close_all, fds)
            found = stack.enter_context(closing(sealed)) if sealed else None
            files = stack.enter_context(StoreFiles(path))
            if files.manifest.digest != digest:
                raise StoreInvalid(f"the store has digest {files.manifest.digest[:12]}, {digest[:12]} was expected")
            planned = self._plan(files.manifest, wish, found)
            reached(FaultPoint.DAEMON_FILES_OPENED)
            work = _Work(files, pool, start + self._settings.collapse_budget_s)
            fds += found.take() if found else []
            for segment in range(len(fds), planned.n_sealed):
                items = [item for item in _items(planned) if item.handle.segment == segment]
                fds.append(self._load_segment(work, planned.segments_nbytes[segment], items))
            memory = self._take_slots(work, planned.slots, fds, stack) if planned.slots else None
            catalogue = self._without_corrupt(planned)
            fds.insert(0, make_segment("expertd-catalogue", encode_catalogue(catalogue)))
            reached(FaultPoint.DAEMON_SEGMENTS_SEALED)
            tiered = self._open_tiered(catalogue, files, memory, self._corrupt) if memory else None
            if tiered is None:
                files.close()
            stack.pop_all()
        return LoadedStore(
            catalogue=catalogue,
            digest=digest,
            nbytes=sum(catalogue.segments_nbytes),
            load_s=time.monotonic() - start,
            huge_nbytes=self._huge_nbytes,
            corrupt=tuple(sorted(self._corrupt)),
            fds=fds,
            tiered=tiered,
        )

    def _plan(self, manifest: Manifest, wish: MemoryWish, found: SealedPart | None) -> Catalogue:
        """Return what goes where; close a sealed part that does not fit to it."""
        available_nbytes = self._available_nbytes()
        if found is not None:
            plan = plan_memory(manifest, wish, available_nbytes + found.nbytes)
            if plan is not None and plan.pinned == found.catalogue.experts.keys():
                return with_slots(found.catalogue, plan.n_slots)
            found.close()
        plan = plan_memory(manifest, wish, available_nbytes)
        return plan_catalogue(manifest) if plan is None else _tiered(manifest, plan)

    def _take_slots(self, work: _Work, area: SlotArea, fds: list[int], stack: ExitStack) -> SlotMemory:
        """Return slots whose memory is taken; `fds` gets what clients are given of them."""
        builders = []
        for nbytes in (*area.segments_nbytes(), area.table_nbytes):
            builder = stack.enter_context(SegmentBuilder("expertd-slots", nbytes))
            self._populate(work, builder)
            fds.append(builder.share())
            builders.append(builder)
        return SlotMemory(area, builders[:-1], builders[-1])

    def _load_segment(self, work: _Work, nbytes: int, items: list[_Item]) -> int:
        with SegmentBuilder(segment_name(work.files.manifest.digest), nbytes) as builder:

            def read(item: _Item) -> None:
                self._check_wanted()
                self._load_record(work.files, builder.view, item)

            self._populate(work, builder)
            reached(FaultPoint.DAEMON_SEGMENT_POPULATED)
            _run_all(work.pool, read, items)
            reached(FaultPoint.DAEMON_SEGMENT_FILLED)
            return builder.seal()

    def _populate(self, work: _Work, builder: SegmentBuilder) -> None:
        def populate(start: int) -> int:
            self._check_wanted()
            stop = min(start + _SLICE_NBYTES, builder.nbytes)
            return builder.populate(start, stop, collapse_until=work.collapse_until)

        self._huge_nbytes += sum(_run_all(work.pool, populate, range(0, builder.nbytes, _SLICE_NBYTES)))

    def _load_record(self, files: StoreFiles, view: memoryview, item: _Item) -> None:
        with view[item.handle.offset : item.handle.offset + item.handle.nbytes] as target:
            damage = _damage(files, item, target)
            if damage is not None:
                if isinstance(item.handle, DenseHandle):
                    raise StoreInvalid(f"{item.name}: {damage}, and nothing works without it")
                target[:] = bytes(len(target))
                self._corrupt.append(item.handle.key)
                logger.error("expert is corrupt key=%s damage=%s", item.handle.key, damage)
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


def _tiered(manifest: Manifest, plan: TierPlan) -> Catalogue:
    return plan_tiered_catalogue(manifest, plan.pinned, plan.n_slots)


def _items(catalogue: Catalogue) -> Iterable[_Item]:
    for name, record in catalogue.manifest.dense.items():
        yield _Item(name, record, catalogue.dense[name])
    for key, handle in catalogue.experts.items():
        yield _Item(str(key), catalogue.manifest.experts[key], handle)


def _damage(files: StoreFiles, item: _Item, target: memoryview) -> str | None:
    """Read a record; return what is wrong with it, None if nothing is."""
    try:
        reached(FaultPoint.DAEMON_RECORD_READING)
        is_whole = files.read_record(item.record, target)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None if is_whole else "its checksum is wrong"
