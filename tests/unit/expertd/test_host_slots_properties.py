"""Whatever happens in whatever order: no decision breaks a rule, and nobody waits for ever."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.host_slots import ReadOutcome
from protocol.handles import ExpertKey
from tests.unit.expertd.slot_world import World

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
SESSIONS = st.integers(0, 2)
SUBSETS = st.lists(st.sampled_from(KEYS), max_size=5)
Event = Callable[[World], object]


def _finished(nth: int, outcome: ReadOutcome) -> Event:
    def finish(world: World) -> None:
        if world.reading:
            world.finish(list(world.reading)[nth % len(world.reading)], outcome)

    return finish


EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(lambda s, keys: lambda world: world.acquire(s, *keys), SESSIONS, SUBSETS),
    st.builds(lambda s, keys: lambda world: world.acquire(s, *dict.fromkeys(keys)), SESSIONS, SUBSETS),
    st.builds(lambda s, keys: lambda world: world.release(s, *keys), SESSIONS, SUBSETS),
    st.builds(
        lambda s, keys, within: lambda world: world.prefetch(s, *keys, within_s=within),
        SESSIONS,
        SUBSETS,
        st.floats(0.0, 2.0),
    ),
    st.builds(_finished, st.integers(0, 3), st.sampled_from(ReadOutcome)),
    st.builds(_finished, st.integers(0, 3), st.just(ReadOutcome.WHOLE)),
    st.builds(lambda s: lambda world: world.close(s), SESSIONS),
    st.builds(lambda seconds: lambda world: world.pass_time(seconds), st.floats(0.0, 12.0)),
)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.lists(EVENTS, max_size=40))
def test_no_order_of_events_breaks_a_rule(n_slots: int, n_reads_max: int, events: list[Event]) -> None:
    world = World(n_slots, n_reads_max)

    for event in events:
        event(world)  # the world checks every decision

    for session in range(3):
        figures = world.slots.figures(session, world.now)
        assert figures.n_leases == len(world.leases.get(session, ()))
        assert figures.waited_s >= 0.0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.lists(EVENTS, max_size=40))
def test_everybody_gets_what_he_asked_for_if_leases_are_given_back(
    n_slots: int, n_reads_max: int, events: list[Event]
) -> None:
    world = World(n_slots, n_reads_max)
    for event in events:
        event(world)

    for _ in range(2000):
        if not world.requests:
            break
        for session, keys in list(world.leases.items()):
            for key in list(keys):
                world.slots.release(session, [], world.now)
                waiting = any(key in r.awaited for (asker, _), r in world.requests.items() if asker == session)
                if not waiting:
                    world.release(session, key)
        if world.reading:
            world.finish_oldest()

    assert world.requests == {}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.lists(EVENTS, max_size=40))
def test_nobody_waits_for_ever_even_if_nobody_gives_anything_back(
    n_slots: int, n_reads_max: int, events: list[Event]
) -> None:
    world = World(n_slots, n_reads_max)
    for event in events:
        event(world)

    for _ in range(2000):
        if not world.requests:
            break
        if world.reading:
            world.finish_oldest()
        else:
            tick = world.slots.next_tick
            assert tick is not None, "requests are open, nothing is read, and time would change nothing"
            world.pass_time(max(0.0, tick - world.now))

    assert world.requests == {}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.lists(EVENTS, max_size=40))
def test_nothing_is_left_of_sessions_that_ended(n_slots: int, events: list[Event]) -> None:
    world = World(n_slots)
    for event in events:
        event(world)

    for session in range(3):
        world.close(session)
    while world.reading:
        world.finish_oldest()

    assert world.slots.next_tick is None
    for key in [key for key in KEYS if key not in world.slots.corrupt]:
        request_id = world.acquire(9, key)
        while world.reading:
            world.finish_oldest()
        assert not world.awaited(9, request_id)
        world.release(9, key)
