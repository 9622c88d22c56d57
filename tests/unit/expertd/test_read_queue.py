"""The order in which pieces of records are read, and how fast at most."""

from expertd.read_queue import PIECE_NBYTES, Job, ReadLimit, ReadQueue
from expertd.store import Checksum
from protocol.handles import ExpertKey
from protocol.layout import R8
from protocol.manifest import Record

A, B, C = (ExpertKey(0, expert) for expert in range(3))


def job(key: ExpertKey, nbytes: int = 2 * PIECE_NBYTES) -> Job:
    return Job(key, Record(R8, (), "file", 0, nbytes, ""), 0, memoryview(b""), Checksum(), 0.0)


def order(queue: ReadQueue) -> list[tuple[ExpertKey, int]]:
    """Take every piece."""
    pieces = []
    while (piece := queue.next()) is not None:
        pieces.append((piece.job.key, piece.number))
    return pieces


def test_a_record_is_cut_into_pieces_that_cover_it() -> None:
    record = job(A, 2 * PIECE_NBYTES + 4096)

    spans = [record.span(piece) for piece in range(record.n_pieces)]

    assert spans == [
        (0, PIECE_NBYTES),
        (PIECE_NBYTES, 2 * PIECE_NBYTES),
        (2 * PIECE_NBYTES, 2 * PIECE_NBYTES + 4096),
    ]


def test_records_that_are_awaited_are_read_one_after_the_other() -> None:
    queue = ReadQueue()
    queue.put(job(A), is_awaited=True)
    queue.put(job(B), is_awaited=True)

    assert order(queue) == [(A, 0), (A, 1), (B, 0), (B, 1)]


def test_what_is_awaited_goes_before_the_rest_of_what_was_only_foreseen() -> None:
    queue = ReadQueue()
    queue.put(job(A), is_awaited=False)
    first = queue.next()
    queue.put(job(B), is_awaited=True)

    assert first is not None
    assert (first.job.key, first.number) == (A, 0)
    assert order(queue) == [(B, 0), (B, 1), (A, 1)]


def test_what_is_hastened_goes_before_what_is_only_foreseen() -> None:
    queue = ReadQueue()
    for key in (A, B, C):
        queue.put(job(key), is_awaited=False)

    queue.hasten(C)

    assert [key for key, _ in order(queue)] == [C, C, A, A, B, B]


def test_what_is_all_begun_needs_no_haste() -> None:
    queue = ReadQueue()
    queue.put(job(A, 4096), is_awaited=False)
    queue.next()

    queue.hasten(A)

    assert order(queue) == []


def test_a_dropped_record_is_begun_no_further() -> None:
    queue = ReadQueue()
    dropped = job(A)
    queue.put(dropped, is_awaited=True)
    queue.next()

    queue.drop(dropped)

    assert order(queue) == []


def test_dropping_a_record_leaves_a_later_one_of_the_same_expert() -> None:
    queue = ReadQueue()
    queue.put(job(A, 4096), is_awaited=True)

    queue.drop(job(A, 4096))

    assert order(queue) == [(A, 0)]


def test_of_an_abandoned_record_nothing_more_is_begun_and_one_that_is_awaited_is_none() -> None:
    queue = ReadQueue()
    queue.put(job(A), is_awaited=False)
    queue.put(job(B), is_awaited=True)
    queue.next()  # of B

    abandoned, kept = queue.abandon(A), queue.abandon(B)

    assert abandoned is not None
    assert abandoned.is_cut_short
    assert kept is None
    assert order(queue) == [(B, 1)]


def test_a_limit_is_kept_over_many_pieces() -> None:
    limit = ReadLimit(100.0)

    there_at = [limit.take(50, asked_at=10.0) for _ in range(4)]

    assert there_at == [10.5, 11.0, 11.5, 12.0]
    assert limit.wait_s(11.0) == 1.0


def test_a_thread_that_comes_late_does_not_make_the_disk_slower() -> None:
    limit = ReadLimit(100.0)
    limit.take(50, asked_at=0.0)

    assert limit.take(50, asked_at=0.1) == 1.0


def test_a_disk_that_was_idle_owes_nothing() -> None:
    limit = ReadLimit(100.0)
    limit.take(50, asked_at=0.0)

    assert limit.wait_s(9.0) == 0.0
    assert limit.take(50, asked_at=9.0) == 9.5
