"""What a request about single experts is answered, and when: the request channel's part of the service.

Pure, as `expertd.service`, and under the same lock. An answer can be to another session than that which asked, and come
of something else than a request: a read that ended, a session that left, time.
"""

from collections.abc import Callable
from typing import NamedTuple

from expertd.sessions import Session, SessionTable
from expertd.stores import StoreTable
from expertd.tiered import TieredReply
from protocol import messages as m
from protocol.messages import Code, Message, Refused


class Reply(NamedTuple):
    """An answer, and whose it is."""

    session: Session
    message: Message


class Requests:
    """The requests of all sessions. `wake` has whoever sends answers call `collect`."""

    def __init__(self, stores: StoreTable, sessions: SessionTable, wake: Callable[[], None]) -> None:
        self._stores = stores
        self._sessions = sessions
        self._wake = wake
        self._unsent: list[Reply] = []

    def handle(self, session: Session, message: Message, now: float) -> list[Reply]:
        """Return the answers that a message on the request channel leads to, to whomever."""
        session.n_requests += 1
        tiered = session.store.tiered if session.store else None
        if tiered is None:
            return _answer_without_slots(session, message, now)
        match message:
            case m.Acquire(request_id, keys):
                if (unknown := tiered.first_unknown(keys)) is not None:
                    return _refuse(session, request_id, Refused(Code.UNKNOWN_EXPERT, f"no expert {unknown}"))
                return self._addressed(tiered.acquire(session.session_id, request_id, keys, now))
            case m.Release(_, keys):
                return self._addressed(tiered.release(session.session_id, keys, now))
            case m.Prefetch(_, keys, deadline_ms):
                known = [key for key in keys if tiered.first_unknown([key]) is None]
                return self._addressed(tiered.prefetch(session.session_id, known, now + deadline_ms / 1000, now))
            case m.GetStats(request_id):
                tiered.seen(session.session_id, now)
                return [Reply(session, session.stats(request_id, now))]
        raise _not_a_request(message)

    def collect(self, now: float) -> list[Reply]:
        """Return the answers that are due for another reason than a request."""
        replies, self._unsent = self._unsent, []
        for store in self._stores.all():
            if store.tiered:
                replies += self._addressed(store.tiered.collect(now))
        return replies

    def next_collection(self) -> float | None:
        """Return when `collect` is to be called if nothing happens."""
        earliest = None
        for store in self._stores.all():  # a loop without more: it is asked with every request
            tiered = store.tiered
            tick = tiered.slots.next_tick if tiered is not None else None
            if tick is not None and (earliest is None or tick < earliest):
                earliest = tick
        return earliest

    def end_session(self, session: Session, now: float) -> None:
        """Free the slots of a session that is gone; others may get what it held."""
        if session.store and session.store.tiered:
            replies = session.store.tiered.close_session(session.session_id, now)
            if replies:
                self._unsent += self._addressed(replies)
                self._wake()

    def _addressed(self, replies: list[TieredReply]) -> list[Reply]:
        return [
            Reply(session, message)
            for session_id, message in replies
            if (session := self._sessions.find(session_id)) is not None
        ]


def _answer_without_slots(session: Session, message: Message, now: float) -> list[Reply]:
    match message:
        case m.Acquire(request_id):
            return _refuse(session, request_id, _why_no_lease(session))
        case m.Release() | m.Prefetch():
            return []  # nothing is leased, foreseen or old
        case m.GetStats(request_id):
            return [Reply(session, session.stats(request_id, now))]
    raise _not_a_request(message)


def _refuse(session: Session, request_id: int, reason: Refused) -> list[Reply]:
    session.n_refused += 1
    return [Reply(session, m.RequestRefusal(request_id, reason))]


def _why_no_lease(session: Session) -> Refused:
    if session.store is None:
        return Refused(Code.NOT_ATTACHED, "attach to a store first")
    return Refused(Code.STORE_IS_RESIDENT, "every expert is mapped already; no lease is needed")


def _not_a_request(message: Message) -> TypeError:
    return TypeError(f"{type(message).__name__} is not decoded on the request channel")
