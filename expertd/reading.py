"""Threads that read experts into slots, check them and say what came of it. Blocks nobody but those threads.

Each thread takes the next piece (`expertd.read_queue`) and reads it straight into the slot. Whoever finishes a piece
adds to the record's checksum what is there, in order, so that reading and checking go on at the same time. A record
with a wrong checksum is read once more, whole.

Threads sleep in the kernel, at a counter of the pieces there are to take, not at a condition: who is woken at a
condition goes on only when the one who woke him lets go of the interpreter, which costs a read the tenth of its time.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from expertd.host_slots import ReadOutcome
from expertd.read_queue import Job, Piece, ReadLimit, ReadQueue
from expertd.store import Checksum, StoreFiles
from protocol.fault_points import FaultPoint, reached
from protocol.handles import ExpertKey
from protocol.manifest import Record

logger = logging.getLogger(__name__)


# The kernel may wake a sleeper so much later than he asked for, and mostly does.
_TIMER_SLACK_S = 50e-6


@dataclass(frozen=True, slots=True)
class ReadEnd:
    """What came of reading one expert into a slot, and how many bytes of it were read."""

    key: ExpertKey
    slot: int
    outcome: ReadOutcome
    nbytes: int


class RecordReader:
    """The reader threads of one store. Owns its files; every method but `join` returns at once.

    `on_end` is called after the last byte and before anybody else touches the slot, from a reader thread, or from the
    caller's of `abandon`.
    `on_stopped` is called from the last thread, when no slot will be written any more; `on_failure` when one of them
    has failed by a fault of ours.
    """

    def __init__(
        self,
        files: StoreFiles,
        n_threads: int,
        limit_nbytes_per_s: float | None,
        *,
        on_end: Callable[[ReadEnd], None],
        on_stopped: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._files = files
        self._on_end = on_end
        self._on_stopped = on_stopped
        self._on_failure = on_failure
        self._queue = ReadQueue()
        self._limit = ReadLimit(limit_nbytes_per_s) if limit_nbytes_per_s else None
        self._lock = threading.Lock()  # of the queue and the jobs
        self._turn = threading.Lock()  # one thread at a time waits for a limited disk
        self._stopping = threading.Event()
        self._n_to_take = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        # Of what nobody waits for, so that what somebody waits for next finds a thread, and a disk that is free soon.
        self._n_hints_max = max(1, n_threads // 2)
        self._being_read: list[Job] = []  # one for each piece
        self._n_put_off = 0  # pieces that nobody waits for, not taken though a thread was there
        self._n_running = n_threads
        self._threads = [
            threading.Thread(target=self._run, name=f"expertd-read-{number}", daemon=True)
            for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, key: ExpertKey, record: Record, slot: int, target: memoryview, *, is_awaited: bool) -> None:
        """Have an expert read into a slot, whose memory the target is."""
        if self._stopping.is_set():
            return
        job = Job(key, record, slot, target, Checksum(), time.monotonic())
        with self._lock:
            self._queue.put(job, is_awaited=is_awaited)
        self._call_for(job.n_pieces)

    def hasten(self, key: ExpertKey) -> None:
        """Have an expert read before what nobody waits for."""
        with self._lock:
            self._queue.hasten(key)
            for job in self._being_read:
                job.is_awaited |= job.key == key
            n_pieces = self._put_off_no_longer(self._n_put_off)
        self._call_for(n_pieces)

    def abandon(self, key: ExpertKey) -> None:
        """Read no further piece of an expert that nobody waits for; one that is all begun is read to its end."""
        with self._lock:
            job = self._queue.abandon(key)
            if job is None or not job.is_at_rest or job.is_being_checked:
                return  # whoever reads or checks a piece of it ends it
        self._end(job, ReadOutcome.DROPPED)

    def stop(self) -> None:
        """Read nothing more; what is being read ends unsaid."""
        if self._stopping.is_set():
            return
        with self._lock:
            self._queue.clear()
            self._stopping.set()
        os.eventfd_write(self._n_to_take, len(self._threads))

    def join(self, timeout_s: float) -> None:
        """Wait until every thread has ended, or for so long: a read from a dead disk cannot be ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- in the reader threads ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                taken = self._next_piece()
                if taken is None:
                    return
                self._read(*taken)
        except Exception:  # the one net of this thread: without it, a slot would be awaited for ever
            logger.exception("a reader thread failed by a fault of ours")
            self._on_failure()
        finally:
            with self._lock:
                self._n_running -= 1
                is_last = self._n_running == 0
            if is_last:
                self._stopping.set()
                os.close(self._n_to_take)
                self._files.close()
                self._on_stopped()

    def _next_piece(self) -> tuple[Piece, float] | None:
        """Wait for a piece; return it and when it may be there, None when all is over."""
        while not self._stopping.is_set():
            os.eventfd_read(self._n_to_take)
            taken = self._take() if self._limit is None else self._take_in_turn(self._limit)
            if taken is not None:  # else it was abandoned
                return taken
        return None

    def _take(self) -> tuple[Piece, float] | None:
        with self._lock:
            piece = self._next()
        return None if piece is None else (piece, 0.0)

    def _take_in_turn(self, limit: ReadLimit) -> tuple[Piece, float] | None:
        """Wait until the disk is free, and only then decide what it reads next."""
        with self._turn:
            self._stopping.wait(limit.wait_s(time.monotonic()))
            with self._lock:
                piece = self._next()
            if piece is None:
                return None
            start, stop = piece.job.span(piece.number)
            return piece, limit.take(stop - start, piece.job.asked_at)

    def _next(self) -> Piece | None:
        piece = self._queue.next(is_hint_welcome=self._n_hints_welcome() > 0)
        if piece is None:
            self._n_put_off += bool(self._queue)
        else:
            self._being_read.append(piece.job)
        return piece

    def _n_hints_welcome(self) -> int:
        """Return how many more pieces that nobody waits for may be read: they take their share of the disk."""
        if any(job.is_awaited for job in self._being_read):
            return 0
        return max(0, self._n_hints_max - len(self._being_read))

    def _call_for(self, n_pieces: int) -> None:
        if n_pieces:
            os.eventfd_write(self._n_to_take, n_pieces)

    def _put_off_no_longer(self, n_most: int) -> int:
        n_pieces = min(self._n_put_off, n_most)
        self._n_put_off -= n_pieces
        return n_pieces

    def _read(self, piece: Piece, ready_at: float) -> None:
        job = piece.job
        start, stop = job.span(piece.number)
        try:
            reached(FaultPoint.DAEMON_SLOT_READING)
            self._files.read_piece(job.record, start, job.target[start:stop])
        except OSError as error:
            job.error = error
        if self._limit and (wait_s := ready_at - time.monotonic() - _TIMER_SLACK_S) > 0.0:
            self._stopping.wait(wait_s)
        self._advance(piece)

    def _advance(self, piece: Piece) -> None:
        """Note that a piece has ended; check what can be checked, and end the record after its last piece."""
        job = piece.job
        with self._lock:
            job.ended.add(piece.number)
            if job.error is not None:
                self._queue.drop(job)
            is_mine = not job.is_being_checked  # else whoever checks looks again
            job.is_being_checked = True
            self._being_read.remove(job)
            n_pieces = self._put_off_no_longer(self._n_hints_welcome())
        self._call_for(n_pieces)
        if is_mine:
            self._check(job)

    def _check(self, job: Job) -> None:
        """Add to the checksum all pieces that follow on each other; one thread at a time for each record."""
        while job.n_checked < job.n_pieces:
            with self._lock:
                if job.is_cut_short or job.n_checked not in job.ended:
                    is_over = job.is_cut_short and job.is_at_rest
                    job.is_being_checked = is_over
                    break
            start, stop = job.span(job.n_checked)
            job.checksum.add(job.target[start:stop])
            job.n_checked += 1
        else:
            self._end(job, self._verdict(job))
            return
        if is_over:
            self._end(job, ReadOutcome.DROPPED if job.error is None else ReadOutcome.FAILED)

    def _verdict(self, job: Job) -> ReadOutcome:
        if job.checksum.hexdigest() == job.record.xxh3_128:
            return ReadOutcome.WHOLE
        logger.warning("checksum is wrong, reading once more key=%s", job.key)
        try:
            is_whole = self._files.read_record(job.record, job.target)
        except OSError as error:
            job.error = error
            return ReadOutcome.FAILED
        return ReadOutcome.WHOLE if is_whole else ReadOutcome.CORRUPT

    def _end(self, job: Job, outcome: ReadOutcome) -> None:
        reached(FaultPoint.DAEMON_SLOT_FILLED)
        if outcome in {ReadOutcome.CORRUPT, ReadOutcome.FAILED}:
            logger.error("expert not read key=%s outcome=%s error=%s", job.key, outcome, job.error)
        if not self._stopping.is_set():
            is_counted = outcome in {ReadOutcome.WHOLE, ReadOutcome.DROPPED}
            self._on_end(ReadEnd(job.key, job.slot, outcome, job.ended_nbytes if is_counted else 0))
        if outcome is not ReadOutcome.DROPPED:
            self._files.forget_cached(job.record)  # what others wait for comes first
