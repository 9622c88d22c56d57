"""The request channel of a store that is resident: counters, hints, and leases nobody needs."""

from expertd.requests import Reply
from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.messages import Code
from tests.unit.expertd.services import attach, connect, new_service, put_store

KEYS = (ExpertKey(0, 0),)


def refusal_of(replies: list[Reply]) -> tuple[int, Code]:
    (reply,) = replies
    assert isinstance(reply.message, m.RequestRefusal)
    return reply.message.request_id, reply.message.reason.code


def test_stats_count_what_a_session_asked_and_was_refused() -> None:
    service = new_service()
    session = connect(service, now=10.0)
    service.requests.handle(session, m.Acquire(1, KEYS), 11.0)

    replies = service.requests.handle(session, m.GetStats(2), 14.0)

    assert replies == [Reply(session, m.Stats(2, 4.0, 2, 1, 0))]


def test_a_prefetch_is_a_hint_and_gets_no_answer() -> None:
    service = new_service()
    session = connect(service)

    replies = service.requests.handle(session, m.Prefetch(1, KEYS, 50), 0.0)

    assert replies == []


def test_a_lease_needs_an_attached_store() -> None:
    service = new_service()
    session = connect(service)

    replies = service.requests.handle(session, m.Acquire(7, KEYS), 0.0)

    assert refusal_of(replies) == (7, Code.NOT_ATTACHED)


def test_a_resident_store_leases_nothing() -> None:
    service = new_service()
    session = connect(service)
    put_store(service)
    attach(service, session)

    replies = service.requests.handle(session, m.Acquire(8, KEYS), 0.0)

    assert refusal_of(replies) == (8, Code.STORE_IS_RESIDENT)
    service.close()


def test_giving_back_what_needs_no_lease_is_not_answered() -> None:
    service = new_service()
    session = connect(service)

    replies = service.requests.handle(session, m.Release(8, KEYS), 0.0)

    assert replies == []


def test_stray_frames_are_counted() -> None:
    service = new_service()

    service.note_stray_frame()

    assert service.status(0.0).n_bad_messages == 1
