"""Which of a call's experts are launched next."""

from collections import deque

from runner.experts.wanted import Awaited, Wanted


def test_what_is_there_goes_together_and_first() -> None:
    wanted = Wanted(0, ready={5: 50, 1: 10}, coming={3: 30})

    assert wanted.take() == {5: 50, 1: 10}


def test_what_comes_goes_one_by_one_in_the_order_of_its_copies() -> None:
    wanted = Wanted(0, coming={3: 30, 1: 10})

    assert [wanted.take(), wanted.take(), wanted.take()] == [{3: 30}, {1: 10}, {}]


def test_what_was_not_submitted_is_not_taken() -> None:
    wanted = Wanted(0, pending={3: 30}, missing=deque([4]))

    assert not wanted.may_launch
    assert wanted.take() == {}
    assert not wanted.is_taken


def test_what_was_submitted_meanwhile_comes() -> None:
    wanted = Wanted(0, pending={3: 30, 4: 40})

    wanted.collect(lambda slot: slot == 40)

    assert (wanted.pending, wanted.coming) == ({3: 30}, {4: 40})


def test_the_naive_way_takes_all_when_all_that_has_slots_was_submitted() -> None:
    wanted = Wanted(0, all_at_once=True, ready={1: 10}, coming={2: 20}, pending={3: 30}, missing=deque([4]))
    before = wanted.take()

    wanted.collect(lambda _: True)

    assert before == {}
    assert wanted.take() == {1: 10, 2: 20, 3: 30}
    assert not wanted.is_taken


def test_each_slot_that_was_being_copied_is_behind_the_one_taken_before() -> None:
    wanted = Wanted(0, ready={1: 10, 2: 20}, coming={3: 30, 4: 40})

    while not wanted.is_taken:
        wanted.take()

    assert wanted.awaited == [Awaited(30, before=20), Awaited(40, before=30)]


def test_the_first_slot_is_behind_none() -> None:
    wanted = Wanted(0, coming={3: 30})

    wanted.take()

    assert wanted.awaited == [Awaited(30, before=None)]
