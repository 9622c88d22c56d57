"""Which piece is copied next: what is waited for first, in the order in which it was asked for."""

from runner.experts.copy_queue import CopyQueue, Outcome, Piece


def submitted(queue: CopyQueue) -> tuple[Piece, Outcome] | None:
    piece = queue.next()
    if piece is None:
        return None
    queue.begin(piece)
    return piece, queue.finish(piece)


def slots_in_order(queue: CopyQueue) -> list[int]:
    slots = []
    while (done := submitted(queue)) is not None:
        slots.append(done[0].slot)
    return slots


def test_a_record_is_cut_into_pieces_that_cover_it() -> None:
    queue = CopyQueue(100)
    queue.add(7, 250, is_demand=True)

    done = [submitted(queue) for _ in range(4)]

    assert done == [
        (Piece(7, 0, 100, is_demand=True, is_first=True, is_last=False), Outcome.MORE),
        (Piece(7, 100, 100, is_demand=True, is_first=False, is_last=False), Outcome.MORE),
        (Piece(7, 200, 50, is_demand=True, is_first=False, is_last=True), Outcome.FILLED),
        None,
    ]


def test_a_record_that_ends_with_a_piece_has_no_empty_one() -> None:
    queue = CopyQueue(100)
    queue.add(0, 200, is_demand=True)

    assert slots_in_order(queue) == [0, 0]


def test_what_is_waited_for_comes_between_the_pieces_of_a_prefetch() -> None:
    queue = CopyQueue(100)
    queue.add(0, 300, is_demand=False)
    first = submitted(queue)
    queue.add(1, 200, is_demand=True)

    rest = slots_in_order(queue)

    assert first is not None
    assert first[0].slot == 0
    assert rest == [1, 1, 0, 0]
    assert queue.is_empty


def test_what_is_waited_for_may_be_one_piece_whatever_was_copied_of_it_before() -> None:
    queue = CopyQueue(100, whole_demands=True)
    queue.add(0, 450, is_demand=False)
    queue.add(1, 250, is_demand=True)
    demanded = submitted(queue)
    submitted(queue)
    queue.promote(0)

    promoted = submitted(queue)

    assert demanded == (Piece(1, 0, 250, is_demand=True, is_first=True, is_last=True), Outcome.FILLED)
    assert promoted == (Piece(0, 100, 350, is_demand=True, is_first=False, is_last=True), Outcome.FILLED)


def test_a_copy_that_was_only_looked_at_can_be_cancelled_at_once() -> None:
    queue = CopyQueue(100)
    queue.add(0, 300, is_demand=False)
    queue.next()

    is_over = queue.cancel(0)

    assert is_over


def test_copies_of_a_kind_are_made_one_after_the_other() -> None:
    queue = CopyQueue(100)
    for slot in (3, 1):
        queue.add(slot, 200, is_demand=False)
    for slot in (2, 0):
        queue.add(slot, 200, is_demand=True)

    assert slots_in_order(queue) == [2, 2, 0, 0, 3, 3, 1, 1]


def test_a_prefetch_that_is_waited_for_goes_on_where_it_was() -> None:
    queue = CopyQueue(100)
    queue.add(0, 100, is_demand=False)
    queue.add(1, 200, is_demand=False)
    submitted(queue)
    submitted(queue)
    queue.add(2, 100, is_demand=False)
    queue.promote(1)

    last = submitted(queue)

    assert last == (Piece(1, 100, 100, is_demand=True, is_first=False, is_last=True), Outcome.FILLED)


def test_promoting_what_is_not_being_copied_changes_nothing() -> None:
    queue = CopyQueue(100)

    queue.promote(5)

    assert queue.next() is None


def test_a_copy_that_is_cancelled_between_two_pieces_ends_at_once() -> None:
    queue = CopyQueue(100)
    queue.add(0, 300, is_demand=False)
    submitted(queue)

    is_over = queue.cancel(0)

    assert is_over
    assert queue.is_empty
    assert queue.next() is None


def test_a_copy_that_is_cancelled_within_a_piece_ends_behind_it() -> None:
    queue = CopyQueue(100)
    queue.add(0, 100, is_demand=False)
    piece = queue.next()
    assert piece is not None
    queue.begin(piece)

    is_over = queue.cancel(0)
    outcome = queue.finish(piece)

    assert not is_over
    assert outcome is Outcome.CANCELLED
    assert queue.next() is None


def test_a_slot_whose_copy_was_cancelled_can_be_filled_again_from_the_start() -> None:
    queue = CopyQueue(100)
    queue.add(0, 300, is_demand=False)
    submitted(queue)
    queue.cancel(0)
    queue.add(0, 100, is_demand=True)

    assert submitted(queue) == (Piece(0, 0, 100, is_demand=True, is_first=True, is_last=True), Outcome.FILLED)
