"""What is counted, and under which word."""

from expertd.counters import BadMessage, Counters, Durations, Rejection, operation
from expertd.service import HELLO_WITHIN_S
from expertd.sessions import Session
from protocol import messages as m
from protocol.fdpass import Credentials
from protocol.messages import Code, Refused
from tests.unit.expertd.services import UID, connect, new_service


def test_a_bound_counts_what_is_not_longer() -> None:
    durations = Durations((0.1, 1.0))

    for duration_s in (0.05, 0.1, 0.5, 1.0, 1.5):
        durations.add(duration_s)

    assert durations.counts == [2, 2, 1]
    assert durations.sum_s == 3.15


def test_a_request_counts_under_its_name_and_outcome() -> None:
    counters = Counters()

    counters.request(m.GetStatus(), m.Unloaded("ab"), 0.5)
    counters.request(m.GetStatus(), Refused(Code.DRAINING, ""), 0.5)
    counters.request(m.Acquire(1, ()), m.RequestRefusal(1, Refused(Code.NOT_ATTACHED, "")), 0.5)
    counters.request(m.Prefetch(1, (), 10), None, 0.5)

    assert dict(counters.requests) == {
        ("get_status", "ok"): 1,
        ("get_status", "draining"): 1,
        ("acquire", "not_attached"): 1,
        ("prefetch", "ok"): 1,
    }
    assert counters.durations["get_status"].sum_s == 1.0


def test_every_message_has_a_name_of_words() -> None:
    assert operation(m.GetStatus()) == "get_status"
    assert operation(m.Stop()) == "stop"


def test_a_copy_changes_no_more() -> None:
    counters = Counters()
    counters.load(10, 0.5)

    copied = counters.copy()
    counters.load(10, 0.5)
    counters.request(m.Stop(), None, 0.1)

    assert (copied.loaded_nbytes, sum(copied.loads.counts)) == (10, 1)
    assert not copied.requests


def test_the_service_counts_bad_messages_by_their_reason() -> None:
    service = new_service()
    session = connect(service)

    service.handle(session, m.Hello(1, 9, "0.1.0"), 0.0)
    service.note_bad_message(session, "junk")
    service.note_stray_frame()

    assert dict(service.counters.bad_messages) == {
        BadMessage.UNEXPECTED: 1,
        BadMessage.MALFORMED: 1,
        BadMessage.STRAY: 1,
    }


def test_the_service_counts_peers_it_turns_away_by_the_reason() -> None:
    service = new_service()
    silent, junk, old = (service.open_session(Credentials(pid, UID), 0.0) for pid in (1, 2, 3))
    assert isinstance(silent, Session)
    assert isinstance(junk, Session)
    assert isinstance(old, Session)
    service.handle(old, m.Hello(98, 99, "9.0"), 0.0)
    for _ in range(3):
        service.note_bad_message(junk, "junk")
    service.close_session(junk, 0.0)
    service.close_session(old, 0.0)

    service.overdue_sessions(HELLO_WITHIN_S + 1.0)
    service.open_session(Credentials(4, UID + 1), 0.0)
    service.drain()
    service.open_session(Credentials(5, UID), 0.0)

    assert service.counters.rejections == {
        Rejection.VERSION: 1,
        Rejection.BAD_MESSAGES: 1,
        Rejection.NO_HELLO: 1,
        Rejection.ANOTHER_USER: 1,
        Rejection.DRAINING: 1,
    }
