"""Which piece of which record is read next, and how fast at most. Pure: knows neither files nor threads.

A record is read in pieces, by several threads at once, so that the disk has enough to do and nobody waits behind the
whole of a record that was only foreseen: pieces of what is waited for go first, record by record; and of what nobody
foresees any more no further piece is read.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from expertd.store import Checksum
from protocol.handles import ExpertKey
from protocol.manifest import Record

PIECE_NBYTES = 4 << 20


@dataclass(slots=True, eq=False)
class Job:
    """One record on its way into a slot since `asked_at`; the memory is the slot's."""

    key: ExpertKey
    record: Record
    slot: int
    target: memoryview
    checksum: Checksum
    asked_at: float
    n_begun: int = 0
    ended: set[int] = field(default_factory=set)
    n_checked: int = 0  # pieces whose bytes have gone into the checksum, in order
    is_being_checked: bool = False
    error: OSError | None = None
    is_awaited: bool = False
    is_abandoned: bool = False

    @property
    def is_cut_short(self) -> bool:
        """Whether no further piece is read, though some are missing."""
        return self.is_abandoned or self.error is not None

    @property
    def is_at_rest(self) -> bool:
        """Whether no piece is being read."""
        return len(self.ended) == self.n_begun

    @property
    def ended_nbytes(self) -> int:
        """How many bytes the pieces have that have ended."""
        return sum(stop - start for start, stop in map(self.span, self.ended))

    @property
    def n_pieces(self) -> int:
        """Into how many pieces the record is cut."""
        return n_pieces(self.record.nbytes)

    def span(self, piece: int) -> tuple[int, int]:
        """Return the first byte of a piece and the one after its last."""
        start = piece * PIECE_NBYTES
        return start, min(start + PIECE_NBYTES, self.record.nbytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a record that is to be read now."""

    job: Job
    number: int


class ReadQueue:
    """Records whose pieces are not all begun yet."""

    def __init__(self) -> None:
        self._awaited: OrderedDict[ExpertKey, Job] = OrderedDict()
        self._foreseen: OrderedDict[ExpertKey, Job] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._awaited or self._foreseen)

    def put(self, job: Job, *, is_awaited: bool) -> None:
        """Add a record."""
        job.is_awaited = is_awaited
        (self._awaited if is_awaited else self._foreseen)[job.key] = job

    def hasten(self, key: ExpertKey) -> None:
        """Note that somebody waits for a record that was only foreseen; one that is all begun needs no haste."""
        job = self._foreseen.pop(key, None)
        if job is not None:
            job.is_awaited = True
            self._awaited[key] = job

    def next(self, *, is_hint_welcome: bool = True) -> Piece | None:
        """Return the next piece, which counts as begun; one that was only foreseen if that is welcome."""
        for jobs in (self._awaited, self._foreseen) if is_hint_welcome else (self._awaited,):
            for key, job in jobs.items():
                piece = Piece(job, job.n_begun)
                job.n_begun += 1
                if job.n_begun == job.n_pieces:
                    del jobs[key]
                return piece
        return None

    def abandon(self, key: ExpertKey) -> Job | None:
        """Begin no further piece of a record that nobody waits for; return it if there was one to begin."""
        job = self._foreseen.pop(key, None)
        if job is not None:
            job.is_abandoned = True
        return job

    def drop(self, job: Job) -> None:
        """Begin no further piece of a record."""
        for jobs in (self._awaited, self._foreseen):
            if jobs.get(job.key) is job:
                del jobs[job.key]

    def clear(self) -> None:
        """Forget everything."""
        self._awaited.clear()
        self._foreseen.clear()


def n_pieces(nbytes: int) -> int:
    """Return into how many pieces so many bytes are cut."""
    return -(-nbytes // PIECE_NBYTES)


class ReadLimit:
    """A disk of a stated speed: when it is free for the next piece, and when that piece is there."""

    def __init__(self, nbytes_per_s: float) -> None:
        self._nbytes_per_s = nbytes_per_s
        self._free_at = 0.0

    def wait_s(self, now: float) -> float:
        """Return how long the disk is still busy."""
        return max(0.0, self._free_at - now)

    def take(self, nbytes: int, asked_at: float) -> float:
        """Return when so many bytes are there that were asked for then.

        Not from now on: a thread that was woken late does not make the disk slower.
        """
        self._free_at = max(self._free_at, asked_at) + nbytes / self._nbytes_per_s
        return self._free_at
