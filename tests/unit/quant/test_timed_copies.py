"""Copies in order, in the time of a link: by the library's thread and by the interpreter's, which do the same."""

import gc
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quant.errors import BadPart, QuantError, WorkspaceForked
from quant.library import library
from quant.timed_copies import Copies, start_copies
from quant.timed_copies_reference import LinkClock, ThreadCopies
from tests.support.waiting import wait_until
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.threads import thread_ids

KINDS: dict[str, Callable[[], Copies]] = {"interpreter": ThreadCopies}
if library() is not None:
    KINDS["library"] = start_copies


@pytest.fixture(params=KINDS)
def copies(request: pytest.FixtureRequest) -> Iterator[Copies]:
    started = KINDS[request.param]()
    yield started
    started.close()


def add(copies: Copies, source: Tensor, target: Tensor, duration_s: float = 0.0) -> int:
    return copies.add(target.data_ptr(), source.data_ptr(), source.numel(), duration_s)


def let_pass(time_s: float) -> None:
    until_s = time.monotonic() + time_s
    wait_until(lambda: time.monotonic() > until_s, f"{time_s} s")


def random_bytes(nbytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("nbytes", [1, 63, 64, 1023, 1024, 1025, 4096, 100_003])
@pytest.mark.parametrize("offset", [0, 1, 17, 63])
def test_a_copy_writes_those_bytes_and_no_others(copies: Copies, nbytes: int, offset: int) -> None:
    source = random_bytes(nbytes)
    around = torch.zeros(nbytes + 256, dtype=torch.uint8)

    copies.wait(add(copies, source, around[offset : offset + nbytes]))

    assert torch.equal(around[offset : offset + nbytes], source)
    assert around.sum() == source.sum()


def test_a_source_that_lies_anywhere_is_copied(copies: Copies) -> None:
    source, target = random_bytes(10_000), torch.zeros(5000, dtype=torch.uint8)

    for offset in range(0, 70, 7):
        copies.wait(add(copies, source[offset : offset + 5000], target))

        assert torch.equal(target, source[offset : offset + 5000])


def test_copies_are_made_in_the_order_in_which_they_were_added(copies: Copies) -> None:
    rows = [random_bytes(5000, seed) for seed in range(200)]
    target = torch.zeros(5000, dtype=torch.uint8)

    places = [add(copies, row, target) for row in rows]
    copies.wait(places[-1])

    assert places == list(range(1, 201))
    assert torch.equal(target, rows[-1])


def test_a_copy_is_done_no_sooner_than_on_the_link(copies: Copies) -> None:
    source, target = random_bytes(100), torch.zeros(100, dtype=torch.uint8)
    began_s = time.monotonic()

    for _ in range(20):
        place = add(copies, source, target, 1.5e-3)
    copies.wait(place)

    assert time.monotonic() - began_s >= 20 * 1.5e-3


def test_a_copy_is_not_done_while_its_time_goes_on(copies: Copies) -> None:
    source, target = random_bytes(100), torch.zeros(100, dtype=torch.uint8)

    place = add(copies, source, target, 0.05)
    wait_until(lambda: torch.equal(target, source), "the bytes")
    was_done = copies.are_done(place)
    copies.wait(place)

    assert (was_done, copies.are_done(place)) == (False, True)


def test_a_source_is_read_when_its_turn_comes(copies: Copies) -> None:
    source, target = random_bytes(100, 1), torch.zeros(100, dtype=torch.uint8)
    copies.hold(1)

    place = add(copies, source, target)
    source.copy_(random_bytes(100, 2))
    was_done = copies.are_done(place)
    copies.release(1)
    copies.wait(place)

    assert not was_done
    assert torch.equal(target, random_bytes(100, 2))


def test_what_is_held_for_a_number_goes_on_with_any_later_one(copies: Copies) -> None:
    source, target = random_bytes(100), torch.zeros(100, dtype=torch.uint8)
    copies.hold(3)
    copies.hold(2)
    place = add(copies, source, target)

    copies.release(2)
    copies.release(5)
    copies.wait(place)

    assert torch.equal(target, source)


def test_the_time_of_what_is_held_begins_with_the_release(copies: Copies) -> None:
    source, target = random_bytes(100), torch.zeros(100, dtype=torch.uint8)
    copies.hold(1)
    place = add(copies, source, target, 5e-3)
    let_pass(5e-3)  # the copy's time, which does not begin yet

    released_s = time.monotonic()
    copies.release(1)
    copies.wait(place)

    assert time.monotonic() - released_s >= 5e-3


def test_what_is_skipped_is_done_and_changes_nothing(copies: Copies) -> None:
    source, target = random_bytes(100), torch.zeros(100, dtype=torch.uint8)
    copies.hold(1)
    place = add(copies, source, target, 3600.0)

    copies.skip()
    copies.release(1)
    copies.wait(place)

    assert target.sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_closing_does_what_was_added_and_leaves_no_thread(kind: str) -> None:
    before = thread_ids()
    source, target = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8)
    copies = KINDS[kind]()
    for _ in range(10):
        add(copies, source, target, 1e-4)

    copies.close()

    assert torch.equal(target, source)
    wait_until(lambda: thread_ids() <= before, "the end of the copies' thread")


def test_waiting_for_what_was_done_long_ago_returns_at_once(copies: Copies) -> None:
    source, target = random_bytes(10), torch.zeros(10, dtype=torch.uint8)
    first = add(copies, source, target)
    copies.wait(add(copies, source, target))

    copies.wait(first)

    assert copies.are_done(first)
    assert copies.are_done(0)


def test_a_sleeping_thread_is_woken(copies: Copies) -> None:
    source, target = random_bytes(10), torch.zeros(10, dtype=torch.uint8)
    for _ in range(3):
        let_pass(5e-3)  # longer than any thread waits awake

        copies.wait(add(copies, source, target, 5e-3))

    assert torch.equal(target, source)


@needs_library
def test_copies_that_are_forgotten_while_held_end() -> None:
    before = thread_ids()
    source, target = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8)
    copies = start_copies()
    copies.hold(1)
    add(copies, source, target, 3600.0)

    del copies
    gc.collect()

    wait_until(lambda: thread_ids() <= before, "the end of the copies' thread")
    assert target.sum() == 0


@needs_library
def test_closed_copies_say_so() -> None:
    copies = start_copies()
    copies.close()

    with pytest.raises(QuantError, match="a copy: closed"):
        copies.add(1, 1, 1, 0.0)
    with pytest.raises(QuantError, match="copies: closed"):
        copies.wait(1)


@needs_library
@pytest.mark.parametrize(("target", "nbytes", "duration_s"), [(0, 1, 0.0), (64, 0, 0.0), (64, -1, 0.0), (64, 1, -1.0)])
def test_what_is_no_copy_is_refused(target: int, nbytes: int, duration_s: float) -> None:
    copies = start_copies()

    with pytest.raises(BadPart, match="a copy: "):
        copies.add(target, 64, nbytes, duration_s)

    copies.close()


@needs_library
def test_copies_in_a_forked_process_are_refused() -> None:
    copies = start_copies()
    child = os.fork()
    if child == 0:
        try:
            copies.add(64, 64, 1, 0.0)
        except WorkspaceForked:
            os._exit(42)
        finally:
            os._exit(1)

    _, status = os.waitpid(child, 0)
    copies.close()

    assert os.waitstatus_to_exitcode(status) == 42


def test_a_copy_starts_when_the_one_before_it_ends_however_late_that_was_seen() -> None:
    clock = LinkClock()
    ends_s = [clock.end_of(1.0, added_s=10.0) for _ in range(100)]

    assert ends_s == [pytest.approx(11.0 + n, rel=1e-12) for n in range(100)]


def test_a_copy_into_an_idle_queue_starts_when_it_was_submitted() -> None:
    clock = LinkClock()
    clock.end_of(1.0, added_s=10.0)

    assert clock.end_of(1.0, added_s=20.0) == 21.0


def test_a_copy_starts_after_the_event_that_its_queue_waited_for() -> None:
    clock = LinkClock()
    clock.held_until(30.0)

    assert clock.end_of(1.0, added_s=20.0) == 31.0
