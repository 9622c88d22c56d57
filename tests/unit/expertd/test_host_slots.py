"""One rule of `HostSlots` each, with events by hand; every decision is checked by the world besides."""

from expertd.demand import HINTS_MAX, REQUESTS_MAX
from expertd.host_slots import LEASE_TTL_S, STARVED_S, HostSlots, ReadOutcome
from protocol.handles import ExpertKey
from tests.unit.expertd.slot_world import NBYTES, World

A, B, C, D, E, F = (ExpertKey(0, expert) for expert in range(6))
CHAT, PREFILLER, THIRD = 1, 2, 3
MANY = [ExpertKey(layer, expert) for layer in range(1, 5) for expert in range(8)]


def filled(n_slots: int, *keys: ExpertKey) -> World:
    """Return a world in which those experts were read, in that order, and are leased by nobody."""
    world = World(n_slots)
    for key in keys:
        world.acquire(THIRD, key)
        world.finish(key)
        world.release(THIRD, key)
    return world


def test_what_is_there_is_granted_at_once_and_counts_as_a_hit() -> None:
    world = filled(2, A)

    request_id = world.acquire(CHAT, A)

    assert not world.awaited(CHAT, request_id)
    assert world.slots.figures(CHAT, 0.0).n_hits == 1


def test_what_is_absent_is_read_and_counts_as_a_miss_once_however_often_it_is_asked_for() -> None:
    world = World(2)

    world.acquire(CHAT, A)
    world.acquire(CHAT, A)
    world.finish(A)

    figures = world.slots.figures(CHAT, 0.0)
    assert (figures.n_hits, figures.n_misses, figures.read_nbytes, world.n_reads) == (0, 1, NBYTES, 1)


def test_sessions_that_ask_for_the_same_expert_share_one_read() -> None:
    world = World(2)
    first, second = world.acquire(CHAT, A), world.acquire(PREFILLER, A)

    world.finish(A)

    assert not world.awaited(CHAT, first)
    assert not world.awaited(PREFILLER, second)
    assert world.n_reads == 1
    assert world.slots.figures(PREFILLER, 0.0).read_nbytes == 0


def test_the_least_recently_used_expert_leaves_first() -> None:
    world = filled(3, A, B, C)
    world.release(CHAT, A)  # used without a message

    world.acquire(CHAT, D)

    assert set(world.ready) == {A, C}
    assert world.slots.figures(CHAT, 0.0).n_hits == 1


def test_what_is_leased_by_one_of_two_sessions_stays() -> None:
    world = filled(2, A, B)
    world.acquire(CHAT, A)
    world.acquire(PREFILLER, A)
    world.release(CHAT, A)

    world.acquire(THIRD, C)

    assert set(world.ready) == {A}


def test_the_end_of_a_session_gives_its_slots_to_who_waits() -> None:
    world = World(1)
    world.acquire(PREFILLER, A)
    world.finish(A)
    request_id = world.acquire(CHAT, B)

    world.close(PREFILLER)
    world.finish(B)

    assert not world.awaited(CHAT, request_id)


def test_a_lease_of_a_silent_session_is_taken_when_its_slot_is_needed() -> None:
    world = World(1)
    world.acquire(PREFILLER, A)
    world.finish(A)
    world.now = LEASE_TTL_S

    world.acquire(CHAT, B)

    assert list(world.reading) == [B]
    assert world.slots.n_leases_lost == 1
    assert world.slots.figures(PREFILLER, world.now).n_leases == 0


def test_any_word_of_a_session_keeps_its_leases() -> None:
    world = World(2)
    world.acquire(PREFILLER, A)
    world.acquire(THIRD, B)
    world.finish(A)
    world.finish(B)
    world.now = LEASE_TTL_S - 1
    world.slots.seen(PREFILLER, world.now)
    world.seen_at[PREFILLER] = world.now
    world.now = LEASE_TTL_S

    world.acquire(CHAT, C)

    assert set(world.ready) == {A}


def test_sessions_that_hold_slots_and_wait_for_more_do_not_block_each_other_for_good() -> None:
    world = World(2)
    world.acquire(CHAT, A)
    world.acquire(PREFILLER, B)
    world.finish(A)
    world.finish(B)
    mine, theirs = world.acquire(CHAT, A, C), world.acquire(PREFILLER, B, D)

    world.pass_time(STARVED_S - 0.01)
    assert world.reading == {}
    world.pass_time(0.01)
    assert list(world.reading) == [C]

    world.finish(C)
    world.pass_time(STARVED_S)
    world.finish(D)
    assert not world.awaited(CHAT, mine)
    assert not world.awaited(PREFILLER, theirs)


def test_a_session_that_asks_for_much_does_not_starve_one_that_asks_for_little() -> None:
    world = World(16, n_reads_max=2)
    world.acquire(PREFILLER, *MANY)

    request_id = world.acquire(CHAT, A, B)

    for _ in range(5):  # two that were under way, and then turn by turn
        world.finish_oldest()
    assert not world.awaited(CHAT, request_id)


def test_turns_go_round_however_many_sessions_wait() -> None:
    world = World(16, n_reads_max=1)
    world.acquire(PREFILLER, *MANY[:4])
    world.acquire(CHAT, A, B)
    world.acquire(THIRD, C, D)

    while world.reading:
        world.finish_oldest()

    assert world.read_order == [MANY[0], A, C, MANY[1], B, D, MANY[2], MANY[3]]


def test_a_session_that_holds_its_share_waits_for_those_who_do_not() -> None:
    world = World(4, n_reads_max=4)
    world.acquire(PREFILLER, *MANY[:8])
    for _ in range(4):
        world.finish_oldest()  # it leases every slot, and nothing can be read
    request_id = world.acquire(CHAT, A, B)

    world.release(PREFILLER, MANY[0])
    world.release(PREFILLER, MANY[1])

    assert set(world.reading) == {A, B}
    world.finish_oldest()
    world.finish_oldest()
    assert not world.awaited(CHAT, request_id)


def test_what_is_withdrawn_is_not_read() -> None:
    world = World(4, n_reads_max=1)
    world.acquire(CHAT, A, B, C)

    world.release(CHAT, B)
    while world.reading:
        world.finish_oldest()

    assert world.read_order == [A, C]


def test_what_one_withdraws_is_read_for_the_other() -> None:
    world = World(4, n_reads_max=1)
    world.acquire(CHAT, A, B)
    request_id = world.acquire(PREFILLER, B)

    world.close(CHAT)
    while world.reading:
        world.finish_oldest()

    assert not world.awaited(PREFILLER, request_id)


def test_the_oldest_of_too_many_requests_gives_way() -> None:
    world = World(64, n_reads_max=1)
    request_ids = [world.acquire(CHAT, key) for key in MANY[: REQUESTS_MAX + 2]]
    for given_up in request_ids[:2]:
        world.requests.pop((CHAT, given_up))

    while world.reading:
        world.finish_oldest()

    assert world.requests == {}
    # The first one was being read already; the second one was not, and is not.
    assert world.n_reads == REQUESTS_MAX + 1


def test_an_expert_that_is_corrupt_is_refused_from_then_on_without_reading() -> None:
    world = World(2)
    world.acquire(CHAT, A)
    world.finish(A, ReadOutcome.CORRUPT)

    request_id = world.acquire(CHAT, A)

    assert not world.awaited(CHAT, request_id)
    assert (world.n_reads, world.slots.n_used, world.slots.n_loads) == (1, 0, 0)


def test_an_expert_that_could_not_be_read_is_read_again_when_it_is_asked_for_again() -> None:
    world = World(2)
    world.acquire(CHAT, A)
    world.finish(A, ReadOutcome.FAILED)

    world.acquire(CHAT, A)
    world.finish(A)

    assert set(world.ready) == {A}


def test_an_empty_request_is_answered() -> None:
    actions = HostSlots(2, 2).acquire(CHAT, 5, [], 0.0)

    assert [(grant.request_id, grant.n_awaited) for grant in actions.grants] == [(5, 0)]


def test_experts_that_come_together_are_told_together() -> None:
    slots = HostSlots(4, 4)
    slots.acquire(CHAT, 1, [A, B, C], 0.0)

    actions = slots.reads_ended([(A, ReadOutcome.WHOLE, 1), (B, ReadOutcome.FAILED, 0)], 1.0)

    (grant,) = actions.grants
    assert (grant.granted, grant.refused, grant.n_awaited) == (((A, 0),), ((B, ReadOutcome.FAILED),), 1)


def test_waiting_is_counted_once_however_much_is_waited_for() -> None:
    world = World(4)
    world.acquire(CHAT, A, B)
    world.now = 2.0
    world.finish(A)
    world.now = 3.0
    world.finish(B)
    world.now = 9.0

    assert world.slots.figures(CHAT, world.now).waited_s == 3.0


# --- hints ------------------------------------------------------------------------------------------------------------


def hints(world: World, session: int = CHAT) -> tuple[int, int, int, int]:
    """Return how many hints were used, late, wasted and dropped."""
    figures = world.slots.figures(session, world.now)
    return figures.n_hints_used, figures.n_hints_late, figures.n_hints_wasted, figures.n_hints_dropped


def test_a_hint_is_read_and_counts_as_used_when_it_was_right() -> None:
    world = World(8)
    world.prefetch(CHAT, A, B)
    world.finish(A)
    world.finish(B)

    world.acquire(CHAT, A)
    world.release(CHAT, B)  # read from the table

    assert hints(world) == (2, 0, 0, 0)
    assert world.slots.figures(CHAT, 0.0).n_hits == 2


def test_a_hint_that_is_being_read_when_it_is_needed_is_late_and_read_once() -> None:
    world = World(8)
    world.prefetch(CHAT, A)

    world.acquire(CHAT, A)
    world.finish(A)

    assert hints(world) == (0, 1, 0, 0)
    assert world.n_reads == 1


def test_a_hint_that_is_queued_when_it_is_needed_is_late_too() -> None:
    world = World(8, n_reads_max=1)
    world.prefetch(CHAT, A, B)

    world.acquire(CHAT, B)

    assert set(world.reading) == {A, B}
    assert hints(world) == (0, 1, 0, 0)


def test_a_hint_whose_expert_is_evicted_unused_is_wasted() -> None:
    world = World(4)
    world.prefetch(CHAT, A, within_s=0.5)
    world.finish(A)
    world.pass_time(0.5)
    world.acquire(CHAT, B, C, D, E)
    for _ in range(4):
        world.finish_oldest()

    assert hints(world) == (0, 0, 1, 0)


def test_a_hint_that_was_not_read_in_time_is_dropped() -> None:
    world = World(8, n_reads_max=1)
    world.acquire(PREFILLER, A)
    world.prefetch(CHAT, B, within_s=0.5)
    world.pass_time(0.5)

    world.finish(A)

    assert world.reading == {}
    assert hints(world) == (0, 0, 0, 1)


def test_the_next_hint_replaces_what_is_queued_of_the_last() -> None:
    world = World(16, n_reads_max=1)
    world.prefetch(CHAT, A, B, C)

    world.prefetch(CHAT, C, D)

    assert list(world.reading) == [A]  # it was begun
    assert hints(world) == (0, 0, 0, 1)
    world.finish(A)
    assert list(world.reading) == [C]


def test_what_is_being_read_and_nobody_foresees_any_more_is_given_up() -> None:
    world = World(16)
    world.prefetch(CHAT, A, B)

    world.prefetch(CHAT, B, C)
    world.finish(A, ReadOutcome.DROPPED)

    assert world.abandoned == [A]
    assert set(world.reading) == {B, C}
    assert hints(world) == (0, 0, 0, 1)


def test_what_another_session_foresees_too_is_read_to_its_end() -> None:
    world = World(16)
    for session in (CHAT, PREFILLER):
        world.prefetch(session, A)

    world.prefetch(CHAT)
    kept = list(world.abandoned)
    world.close(PREFILLER)

    assert kept == []
    assert world.abandoned == [A]


def test_what_somebody_waits_for_is_not_given_up() -> None:
    world = World(16)
    world.prefetch(CHAT, A)
    world.acquire(PREFILLER, A)

    world.prefetch(CHAT)

    assert world.abandoned == []


def test_what_was_given_up_and_is_waited_for_after_all_is_read_anew() -> None:
    world = World(16)
    world.prefetch(CHAT, A)
    world.prefetch(CHAT)
    request = world.acquire(CHAT, A)

    world.finish(A, ReadOutcome.DROPPED)
    world.finish(A)

    assert world.n_reads == 2
    assert not world.awaited(CHAT, request)
    assert hints(world) == (0, 1, 0, 0)


def test_a_right_hint_counts_as_used_though_its_use_is_heard_of_before_the_end_of_its_reading() -> None:
    world = World(8)
    world.prefetch(CHAT, A)

    world.release(CHAT, A)  # read from the table
    world.finish(A)

    assert hints(world) == (1, 0, 0, 0)
    assert world.slots.figures(CHAT, 0.0).n_hits == 1


def test_a_session_has_a_bounded_number_of_hints() -> None:
    world = World(400, n_reads_max=1)
    world.acquire(PREFILLER, A)

    world.prefetch(CHAT, *[ExpertKey(7, expert) for expert in range(HINTS_MAX + 5)])

    assert hints(world) == (0, 0, 0, 5)


def test_what_is_waited_for_is_read_before_what_is_foreseen() -> None:
    world = World(16, n_reads_max=1)
    world.prefetch(CHAT, *MANY[:3])
    world.acquire(PREFILLER, A, B)

    while world.reading:
        world.finish_oldest()

    assert world.read_order == [MANY[0], A, B, MANY[1], MANY[2]]


def test_hints_of_several_sessions_go_by_turns() -> None:
    world = World(16, n_reads_max=1)
    world.prefetch(PREFILLER, *MANY[:3])
    world.prefetch(CHAT, A)

    while world.reading:
        world.finish_oldest()

    assert world.read_order == [MANY[0], A, MANY[1], MANY[2]]


def test_hints_take_at_most_a_quarter_of_the_slots() -> None:
    world = World(8, n_reads_max=8)

    world.prefetch(CHAT, *MANY[:6])

    assert len(world.reading) == 2


def test_a_hint_never_takes_a_leased_slot() -> None:
    world = World(2)
    world.acquire(PREFILLER, A, B)
    world.finish(A)
    world.finish(B)

    world.prefetch(CHAT, C)

    assert world.reading == {}


def test_a_hint_for_what_is_there_or_waited_for_is_no_hint() -> None:
    world = filled(4, A)
    world.acquire(CHAT, B)

    world.prefetch(CHAT, A, B)

    assert (set(world.reading), hints(world)) == ({B}, (0, 0, 0, 0))


def test_an_outdated_hint_leaves_before_what_was_used_long_ago() -> None:
    world = filled(3, A, B)
    world.prefetch(CHAT, C, within_s=0.5)
    world.finish(C)
    world.pass_time(1.0)

    world.acquire(CHAT, D)

    assert set(world.ready) == {A, B}


def test_the_hints_of_a_session_end_with_it() -> None:
    world = World(16, n_reads_max=1)
    world.prefetch(CHAT, A, B)

    world.close(CHAT)
    world.finish(A)

    assert world.reading == {}
