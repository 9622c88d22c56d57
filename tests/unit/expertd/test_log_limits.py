"""A peer in a loop writes some lines, then one a second; the next line that passes says how many did not."""

import logging

from expertd.log_limits import BURST, EVERY_S, LineLimit

BAD_MESSAGE = "bad message session=%d pid=%d"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(template: str = BAD_MESSAGE, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("expertd", logging.WARNING, "", 0, template, arguments or (1, 77), None)


def passing(limit: LineLimit, n: int, template: str = BAD_MESSAGE, *arguments: object) -> int:
    """Return how many of n records pass."""
    return sum(limit.filter(record(template, *arguments)) for _ in range(n))


def test_some_lines_pass_at_once_then_one_a_second() -> None:
    clock = Clock()
    limit = LineLimit(clock)

    at_once = passing(limit, 1000)
    clock.now += 3 * EVERY_S
    later = passing(limit, 1000)

    assert at_once == BURST
    assert later == 3


def test_the_next_line_says_how_many_were_suppressed_and_the_one_after_does_not() -> None:
    clock = Clock()
    limit = LineLimit(clock)
    passing(limit, BURST + 5)
    clock.now += 2 * EVERY_S
    first, second = record(), record()

    assert limit.filter(first)
    assert limit.filter(second)

    assert (first.__dict__["n_suppressed"], second.__dict__["n_suppressed"]) == (5, 0)


def test_one_peer_takes_nothing_from_another_nor_from_other_events() -> None:
    limit = LineLimit(Clock())
    passing(limit, 1000, BAD_MESSAGE, 1, 77)

    assert passing(limit, 3, BAD_MESSAGE, 2, 78) == 3
    assert passing(limit, 3, "no hello in time session=%d pid=%d", 1, 77) == 3


def test_a_peer_that_comes_back_in_another_session_is_the_same_peer() -> None:
    limit = LineLimit(Clock())

    passed = sum(limit.filter(record(BAD_MESSAGE, session, 77)) for session in range(100))

    assert passed == BURST


def test_ever_new_peers_take_bounded_memory() -> None:
    limit = LineLimit(Clock())

    for pid in range(5000):
        limit.filter(record(BAD_MESSAGE, 1, pid))

    assert len(limit._allowances) <= 1024
