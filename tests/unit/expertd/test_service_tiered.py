"""The request channel of a store with slots: who is answered, by whose doing, and when nobody has asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.budget import MemoryWish
from expertd.host_slots import LEASE_TTL_S
from expertd.loader import Loader, LoaderSettings, LoadProgress
from expertd.requests import Reply
from expertd.service import MemoryFigures, Service
from expertd.sessions import Session
from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code
from tests.support.tiers import memory_for, open_tiered
from tests.support.waiting import wait_until
from tests.unit.expertd.services import PID, UID, attach, connect

A, B, C, D, E = (ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(0, 3), ExpertKey(1, 0))


class Tiered:
    """A service that holds a store of eight experts with four slots."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self.n_wakes = 0
        tokens = iter(range(100))
        self.service = Service(
            uid=UID,
            pid=PID,
            new_token=lambda nbytes: next(tokens).to_bytes(nbytes, "big"),
            memory=lambda: MemoryFigures(1 << 20, 1 << 30),
            now=0.0,
            wake_requests=self._woken,
        )
        loader = Loader(LoaderSettings(2, 0.0), lambda: 1 << 40, LoadProgress(), open_tiered)
        wish = MemoryWish(memory_for(manifest, 4))
        held = self.service.begin_load(store, manifest.digest, wish)
        self.service.store_loaded(held, loader.load(store, manifest.digest, wish), 0.0)
        self._digest = manifest.digest

    def session(self, pid: int) -> Session:
        """Return a session that is attached."""
        session = connect(self.service, pid)
        attach(self.service, session, self._digest)
        return session

    def ask(self, session: Session, message: m.Message, now: float = 0.0) -> list[Reply]:
        return self.service.requests.handle(session, message, now)

    def collected(self, n_replies: int, now: float = 0.0) -> list[Reply]:
        """Return so many replies of those that come without a request."""
        replies: list[Reply] = []

        def are_there() -> bool:
            replies.extend(self.service.requests.collect(now))
            return len(replies) >= n_replies

        wait_until(are_there, f"{n_replies} replies")
        return replies

    def lease(self, session: Session, *keys: ExpertKey, now: float = 0.0) -> None:
        """Let a session hold experts that were absent."""
        self.ask(session, m.Acquire(1, keys), now)
        n_awaited = len(keys)
        while n_awaited:
            (reply, *_) = self.collected(1, now)
            assert isinstance(reply.message, m.Granted)
            n_awaited = reply.message.n_awaited

    def _woken(self) -> None:
        self.n_wakes += 1


@pytest.fixture
def tiered(store: Path, manifest: Manifest) -> Iterator[Tiered]:
    made = Tiered(store, manifest)
    yield made
    made.service.close()


def test_what_was_read_is_told_to_who_waits_for_it(tiered: Tiered) -> None:
    session = tiered.session(1)

    at_once = tiered.ask(session, m.Acquire(7, (A,)))
    later = tiered.collected(1)

    assert at_once == []
    assert [(reply.session, type(reply.message)) for reply in later] == [(session, m.Granted)]
    assert isinstance(later[0].message, m.Granted)
    assert (later[0].message.request_id, later[0].message.n_awaited) == (7, 0)


def test_what_is_there_is_told_at_once(tiered: Tiered) -> None:
    first, second = tiered.session(1), tiered.session(2)
    tiered.lease(first, A)

    (reply,) = tiered.ask(second, m.Acquire(7, (A,)))

    assert reply.session is second
    assert isinstance(reply.message, m.Granted)
    assert [handle.key for handle in reply.message.handles] == [A]


def test_the_end_of_one_session_is_an_answer_to_another_and_wakes_who_sends_it(tiered: Tiered) -> None:
    leaving, waiting = tiered.session(1), tiered.session(2)
    tiered.lease(leaving, A, B, C, D)
    tiered.ask(waiting, m.Acquire(5, (E,)))

    tiered.service.close_session(leaving, 0.0)
    (reply,) = tiered.collected(1)

    assert reply.session is waiting
    assert isinstance(reply.message, m.Granted)
    assert [handle.key for handle in reply.message.handles] == [E]


def test_nobody_answers_a_session_that_has_ended(tiered: Tiered) -> None:
    """What it waited for may have been read by then; whoever asks next is answered at once, or later."""
    leaving, staying = tiered.session(1), tiered.session(2)
    tiered.ask(leaving, m.Acquire(1, (A,)))

    tiered.service.close_session(leaving, 0.0)
    replies = tiered.ask(staying, m.Acquire(2, (A,))) or tiered.collected(1)

    assert [reply.session for reply in replies] == [staying]


def test_an_expert_that_no_store_has_is_refused_and_counted(tiered: Tiered) -> None:
    session = tiered.session(1)

    (reply,) = tiered.ask(session, m.Acquire(9, (A, ExpertKey(5, 0))))
    (stats,) = tiered.ask(session, m.GetStats(10))

    assert isinstance(reply.message, m.RequestRefusal)
    assert (reply.message.request_id, reply.message.reason.code) == (9, Code.UNKNOWN_EXPERT)
    assert isinstance(stats.message, m.Stats)
    assert (stats.message.n_refused, stats.message.n_misses) == (1, 0)


def test_asking_for_its_counters_keeps_a_sessions_leases(tiered: Tiered) -> None:
    holder, other = tiered.session(1), tiered.session(2)
    tiered.lease(holder, A, B, C, D)
    tiered.ask(holder, m.GetStats(3), now=LEASE_TTL_S - 1)

    tiered.ask(other, m.Acquire(5, (E,)), now=LEASE_TTL_S)

    (stats,) = tiered.ask(holder, m.GetStats(4), now=LEASE_TTL_S)
    assert isinstance(stats.message, m.Stats)
    assert stats.message.n_leases == 4


def test_silence_costs_a_session_its_leases_when_the_slots_are_needed(tiered: Tiered) -> None:
    holder, other = tiered.session(1), tiered.session(2)
    tiered.lease(holder, A, B, C, D)

    tiered.ask(other, m.Acquire(5, (E,)), now=LEASE_TTL_S)
    tiered.collected(1, now=LEASE_TTL_S)

    (stats,) = tiered.ask(holder, m.GetStats(4), now=LEASE_TTL_S)
    assert isinstance(stats.message, m.Stats)
    assert stats.message.n_leases == 3


def test_a_hint_for_what_no_store_has_is_passed_over(tiered: Tiered) -> None:
    session = tiered.session(1)

    replies = tiered.ask(session, m.Prefetch(1, (ExpertKey(5, 0), A), 60_000))

    assert replies == []
    wait_until(lambda: _is_there(tiered, session), "the hint to be read")


def test_time_matters_only_while_somebody_waits_for_a_slot(tiered: Tiered) -> None:
    holder, other = tiered.session(1), tiered.session(2)
    before = tiered.service.requests.next_collection()
    tiered.lease(holder, A, B, C, D)

    tiered.ask(other, m.Acquire(5, (E,)), now=2.0)

    assert before is None
    assert tiered.service.requests.next_collection() == 3.0


def _is_there(tiered: Tiered, session: Session) -> bool:
    tiered.service.requests.collect(0.0)
    return session.store is not None and session.store.tiered is not None and session.store.tiered.slots.n_loads == 1
