"""Reader threads over real files: every byte right, or a reason; and an end that leaves nothing."""

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.host_slots import ReadOutcome
from expertd.read_queue import PIECE_NBYTES
from expertd.reading import ReadEnd, RecordReader
from expertd.store import StoreFiles
from protocol.handles import ExpertKey
from protocol.manifest import Manifest, Record
from protocol.segment import SegmentBuilder
from tests.support.leaks import holdings
from tests.support.page_cache import cached_nbytes, drop_cached
from tests.support.stores import EXPERTS_FILE, flip_byte, write_random_store
from tests.support.waiting import wait_until

A, B = ExpertKey(0, 0), ExpertKey(0, 1)
WITHIN_S = 20.0
N_THREADS = 3


class Reading:
    """A reader over a store, slots to read into, and what the reader said."""

    def __init__(self, files: StoreFiles, *, limit_nbytes_per_s: float | None = None) -> None:
        self.manifest = files.manifest
        self.ended: queue.Queue[ReadEnd] = queue.Queue()
        self.stopped = threading.Event()
        self.failed = threading.Event()
        self._builder = SegmentBuilder("expertd-test", sum(r.nbytes for r in self.manifest.experts.values()))
        self._builder.populate(0, self._builder.nbytes, collapse_until=0.0)
        self._end = 0
        self.reader = RecordReader(
            files,
            N_THREADS,
            limit_nbytes_per_s,
            on_end=self.ended.put,
            on_stopped=self.stopped.set,
            on_failure=self.failed.set,
        )

    def read(self, key: ExpertKey, *, is_awaited: bool = True) -> memoryview:
        """Have an expert read; return where it goes."""
        nbytes = self.manifest.experts[key].nbytes
        target = self._builder.view[self._end : self._end + nbytes]
        self._end += nbytes
        self.reader.read(key, self.manifest.experts[key], key.expert, target, is_awaited=is_awaited)
        return target

    def next_end(self) -> ReadEnd:
        return self.ended.get(timeout=WITHIN_S)

    def close(self) -> None:
        self.reader.stop()
        self.reader.join(WITHIN_S)
        assert self.stopped.wait(WITHIN_S)
        self._builder.close()


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A store of experts of several pieces each."""
    path = tmp_path / "big"
    write_random_store(path, n_layers=1, n_experts=2, hidden=2048, intermediate=4096)
    return path


@pytest.fixture
def reading(big: Path) -> Iterator[Reading]:
    files = StoreFiles(big)
    files.open_direct()
    opened = Reading(files)
    yield opened
    opened.close()


def content(store: Path, manifest: Manifest, key: ExpertKey) -> bytes:
    record = manifest.experts[key]
    return (store / EXPERTS_FILE).read_bytes()[record.offset : record.offset + record.nbytes]


def test_records_of_several_pieces_come_whole(reading: Reading, big: Path) -> None:
    targets = {key: reading.read(key) for key in (A, B)}

    ends = {reading.next_end(), reading.next_end()}

    nbytes = reading.manifest.experts[A].nbytes
    assert nbytes > 2 * PIECE_NBYTES
    assert ends == {ReadEnd(A, 0, ReadOutcome.WHOLE, nbytes), ReadEnd(B, 1, ReadOutcome.WHOLE, nbytes)}
    for key, target in targets.items():
        assert bytes(target) == content(big, reading.manifest, key)


def test_a_wrong_byte_in_any_piece_makes_a_record_corrupt(big: Path) -> None:
    files = StoreFiles(big)
    record = files.manifest.experts[A]
    flip_byte(big / EXPERTS_FILE, record.offset + record.nbytes - 5000)
    reading = Reading(files)

    reading.read(A)
    reading.read(B)
    outcomes = {end.key: end.outcome for end in (reading.next_end(), reading.next_end())}

    assert outcomes == {A: ReadOutcome.CORRUPT, B: ReadOutcome.WHOLE}
    reading.close()


@pytest.mark.parametrize("cut", [PIECE_NBYTES // 2 + 1000, PIECE_NBYTES, PIECE_NBYTES + 4096])
def test_a_file_that_ends_too_early_is_a_failure(reading: Reading, big: Path, cut: int) -> None:
    os.truncate(big / EXPERTS_FILE, reading.manifest.experts[B].offset + cut)

    reading.read(B)
    reading.read(A)
    outcomes = {end.key: end.outcome for end in (reading.next_end(), reading.next_end())}

    assert outcomes == {B: ReadOutcome.FAILED, A: ReadOutcome.WHOLE}


class OnceWrong(StoreFiles):
    """Files whose pieces come wrong, as from rotten memory, and right when a record is read once more."""

    def read_piece(self, record: Record, start: int, target: memoryview) -> None:
        super().read_piece(record, start, target)
        target[7] ^= 1


def test_a_record_that_is_right_the_second_time_is_whole(big: Path) -> None:
    reading = Reading(OnceWrong(big))

    target = reading.read(A)

    assert reading.next_end().outcome is ReadOutcome.WHOLE
    assert bytes(target) == content(big, reading.manifest, A)
    reading.close()


class Broken(StoreFiles):
    """Files with a fault of ours."""

    def read_piece(self, *_arguments: object, **_keywords: object) -> None:
        raise ZeroDivisionError


def test_a_fault_of_ours_is_said(big: Path) -> None:
    reading = Reading(Broken(big))

    reading.read(A)

    assert reading.failed.wait(WITHIN_S)
    reading.close()


def test_a_limit_makes_reading_as_slow_as_it_says(big: Path) -> None:
    files = StoreFiles(big)
    nbytes = files.manifest.experts[A].nbytes
    reading = Reading(files, limit_nbytes_per_s=nbytes / 0.3)
    start = time.monotonic()

    reading.read(A)
    reading.next_end()

    assert time.monotonic() - start >= 0.3
    reading.close()


def test_what_is_awaited_overtakes_what_is_foreseen_on_a_slow_disk(big: Path) -> None:
    files = StoreFiles(big)
    reading = Reading(files, limit_nbytes_per_s=files.manifest.experts[A].nbytes / 0.2)
    reading.read(A, is_awaited=False)

    reading.read(B)

    assert [reading.next_end().key, reading.next_end().key] == [B, A]
    reading.close()


def test_stopping_amid_a_read_ends_soon_and_says_nothing_of_it(big: Path) -> None:
    before = holdings()
    files = StoreFiles(big)
    files.open_direct()
    reading = Reading(files, limit_nbytes_per_s=1000.0)
    reading.read(A)

    reading.close()

    assert reading.ended.empty()
    assert holdings().beyond(before) == []


def test_no_second_copy_stays_in_the_page_cache(reading: Reading, big: Path) -> None:
    path = big / EXPERTS_FILE
    nbytes = reading.manifest.experts[A].nbytes
    drop_cached(path)  # also writes what is dirty, which cannot be dropped
    path.read_bytes()
    before = cached_nbytes(path)

    reading.read(A)
    reading.next_end()

    assert before >= 2 * nbytes
    wait_until(lambda: cached_nbytes(path) <= before - nbytes + PIECE_NBYTES, "the cached copy to go")


class Gated(StoreFiles):
    """Files of which no piece is read before it is allowed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def read_piece(self, record: Record, start: int, target: memoryview) -> None:
        self.begun.release()
        assert self.allowed.acquire(timeout=WITHIN_S)
        super().read_piece(record, start, target)


def test_what_nobody_foresees_any_more_is_read_no_further(big: Path) -> None:
    files = Gated(big)
    reading = Reading(files)
    reading.read(A, is_awaited=False)
    assert files.begun.acquire(timeout=WITHIN_S)

    reading.reader.abandon(A)
    files.allowed.release(100)

    assert reading.next_end() == ReadEnd(A, 0, ReadOutcome.DROPPED, PIECE_NBYTES)
    reading.read(B)
    assert reading.next_end().outcome is ReadOutcome.WHOLE
    reading.close()


def test_what_nobody_foresees_any_more_is_not_even_begun(big: Path) -> None:
    files = Gated(big)
    reading = Reading(files)
    reading.read(B)
    for _ in range(N_THREADS):
        assert files.begun.acquire(timeout=WITHIN_S)
    reading.read(A, is_awaited=False)

    reading.reader.abandon(A)

    assert reading.next_end() == ReadEnd(A, 0, ReadOutcome.DROPPED, 0)
    files.allowed.release(100)
    assert reading.next_end().outcome is ReadOutcome.WHOLE
    reading.close()


def test_what_somebody_waits_for_meanwhile_is_read_to_its_end(big: Path) -> None:
    reading = Reading(StoreFiles(big))
    reading.read(A, is_awaited=False)

    reading.reader.hasten(A)
    reading.reader.abandon(A)

    assert reading.next_end().outcome is ReadOutcome.WHOLE
    reading.close()


def test_what_is_only_foreseen_leaves_threads_for_what_somebody_waits_for(big: Path) -> None:
    files = Gated(big)
    reading = Reading(files)
    reading.read(A, is_awaited=False)
    assert files.begun.acquire(timeout=WITHIN_S)
    others_wait = not files.begun.acquire(timeout=0.05)

    reading.read(B)

    assert others_wait
    for _ in range(N_THREADS - 1):
        assert files.begun.acquire(timeout=WITHIN_S)
    files.allowed.release(100)
    assert {reading.next_end().key, reading.next_end().key} == {A, B}
    reading.close()


def test_what_is_hastened_has_all_threads(big: Path) -> None:
    files = Gated(big)
    reading = Reading(files)
    reading.read(A, is_awaited=False)
    assert files.begun.acquire(timeout=WITHIN_S)
    assert not files.begun.acquire(timeout=0.05)

    reading.reader.hasten(A)

    for _ in range(N_THREADS - 1):
        assert files.begun.acquire(timeout=WITHIN_S)
    files.allowed.release(100)
    assert reading.next_end().outcome is ReadOutcome.WHOLE
    reading.close()


def test_nothing_is_read_on_a_hint_while_something_is_read_that_somebody_waits_for(big: Path) -> None:
    files = Gated(big)
    reading = Reading(files)
    n_pieces = -(-reading.manifest.experts[A].nbytes // PIECE_NBYTES)
    reading.read(A)
    for _ in range(N_THREADS):
        assert files.begun.acquire(timeout=WITHIN_S)

    reading.read(B, is_awaited=False)
    files.allowed.release(n_pieces - 1)  # all of the first but its last piece
    for _ in range(n_pieces - N_THREADS):
        assert files.begun.acquire(timeout=WITHIN_S)

    assert not files.begun.acquire(timeout=0.05)
    files.allowed.release(100)
    assert {reading.next_end().key, reading.next_end().key} == {A, B}
    reading.close()
