"""Who gets a session, with which version and token, and how it ends."""

from dataclasses import replace
from pathlib import Path

import pytest

from expertd.service import BAD_MESSAGES_MAX, HELLO_WITHIN_S
from expertd.sessions import Session
from expertd.stores import HeldStore
from protocol import messages as m
from protocol.codec import encode
from protocol.fdpass import Credentials
from protocol.messages import Code
from protocol.schema import SESSIONS_MAX
from protocol.version import HIGHEST_PROTOCOL_VERSION, LIBRARY_VERSION, LOWEST_PROTOCOL_VERSION
from tests.unit.expertd.services import PID, UID, connect, new_service, refusal


def test_the_highest_common_version_wins() -> None:
    service = new_service()
    session = service.open_session(Credentials(1, UID), 0.0)
    assert isinstance(session, Session)

    outcome = service.handle(session, m.Hello(0, HIGHEST_PROTOCOL_VERSION + 7, "9.9"), 0.0)

    assert isinstance(outcome.reply, m.Welcome)
    assert (outcome.reply.version, outcome.reply.pid) == (HIGHEST_PROTOCOL_VERSION, PID)


@pytest.mark.parametrize(
    ("lowest", "highest"),
    [
        (HIGHEST_PROTOCOL_VERSION + 1, HIGHEST_PROTOCOL_VERSION + 3),
        (0, LOWEST_PROTOCOL_VERSION - 1),
        (HIGHEST_PROTOCOL_VERSION + 1, LOWEST_PROTOCOL_VERSION),
    ],
)
def test_no_common_version_ends_the_session_and_says_both_sides(lowest: int, highest: int) -> None:
    service = new_service()
    session = service.open_session(Credentials(1, UID), 0.0)
    assert isinstance(session, Session)

    outcome = service.handle(session, m.Hello(lowest, highest, "9.9"), 0.0)

    assert refusal(outcome.reply).code is Code.VERSION_MISMATCH
    assert LIBRARY_VERSION in refusal(outcome.reply).detail
    assert outcome.must_drop
    assert session.token is None


def test_nothing_is_answered_before_hello() -> None:
    service = new_service()
    session = service.open_session(Credentials(1, UID), 0.0)
    assert isinstance(session, Session)

    outcome = service.handle(session, m.GetStatus(), 0.0)

    assert refusal(outcome.reply).code is Code.BAD_MESSAGE
    assert session.n_bad_messages == 1


def test_a_second_hello_is_a_bad_message_and_leaves_the_token() -> None:
    service = new_service()
    session = connect(service)
    token = session.token

    outcome = service.handle(session, m.Hello(2, 2, "0.1.0"), 0.0)

    assert refusal(outcome.reply).code is Code.BAD_MESSAGE
    assert session.token == token


def test_only_the_third_bad_message_ends_the_session() -> None:
    service = new_service()
    session = connect(service)

    drops = [service.note_bad_message(session, "nonsense").must_drop for _ in range(BAD_MESSAGES_MAX)]

    assert drops == [False, False, True]
    assert service.status(0.0).n_bad_messages == BAD_MESSAGES_MAX


def test_a_message_of_the_request_channel_is_bad_on_the_control_channel() -> None:
    service = new_service()
    session = connect(service)

    outcome = service.handle(session, m.GetStats(1), 0.0)

    assert refusal(outcome.reply).code is Code.BAD_MESSAGE


def test_another_user_gets_no_session() -> None:
    service = new_service()

    session = service.open_session(Credentials(1, UID + 1), 0.0)

    assert not isinstance(session, Session)
    assert service.status(0.0).sessions == ()


def test_a_token_is_good_for_its_own_process_only() -> None:
    service = new_service()
    session = connect(service, pid=5)
    assert session.token is not None

    own = service.session_of(session.token, Credentials(5, UID))
    other_process = service.session_of(session.token, Credentials(6, UID))
    other_user = service.session_of(session.token, Credentials(5, UID + 1))
    wrong_token = service.session_of(b"\xff" * 16, Credentials(5, UID))

    assert own is session
    assert (other_process, other_user, wrong_token) == (None, None, None)


def test_a_closed_session_has_no_token() -> None:
    service = new_service()
    session = connect(service)
    assert session.token is not None

    service.close_session(session, 1.0)
    service.close_session(session, 2.0)

    assert service.session_of(session.token, session.peer) is None
    assert service.status(2.0).sessions == ()


def test_there_are_at_most_so_many_sessions() -> None:
    service = new_service()
    sessions = [connect(service, pid) for pid in range(SESSIONS_MAX)]

    one_more = service.open_session(Credentials(1, UID), 0.0)
    service.close_session(sessions[0], 0.0)
    after_one_left = service.open_session(Credentials(1, UID), 0.0)

    assert not isinstance(one_more, Session)
    assert one_more.code is Code.TOO_MANY
    assert isinstance(after_one_left, Session)


def test_who_says_no_hello_in_time_is_overdue() -> None:
    service = new_service()
    silent = service.open_session(Credentials(1, UID), 0.0)
    connect(service, pid=2, now=0.0)

    early = service.overdue_sessions(HELLO_WITHIN_S)
    late = service.overdue_sessions(HELLO_WITHIN_S + 0.01)

    assert early == []
    assert late == [silent]


def test_a_draining_daemon_takes_no_session() -> None:
    service = new_service()
    service.drain()

    session = service.open_session(Credentials(1, UID), 0.0)

    assert not isinstance(session, Session)
    assert session.code is Code.DRAINING


def test_stop_is_answered_and_carried_out() -> None:
    service = new_service()
    session = connect(service)

    outcome = service.handle(session, m.Stop(), 0.0)

    assert isinstance(outcome.reply, m.Stopping)
    assert outcome.must_stop


def test_the_longest_status_fits_into_a_message() -> None:
    """Every session and store a client can make, each with the longest texts it can choose."""

    from protocol.schema import STORES_MAX

    service = new_service()
    path = "/" + "\U0001f600" * 255  # 1021 bytes
    for number in range(STORES_MAX):
        store = service.begin_load(Path(path), f"{number:064x}")
        service.store_failed(store, Code.VERSION_MISMATCH, "\U0001f600" * 600)
    for pid in range(SESSIONS_MAX):
        session = service.open_session(Credentials((1 << 31) - pid, UID), 0.0)
        assert isinstance(session, Session)
        service.handle(session, m.Hello(2, 2, "\U0001f600" * 64), 0.0)
        session.store = HeldStore(f"{0:064x}", Path("/store"))
    status = service.status(1e9)
    most = (1 << 63) - 1
    stores = [replace(s, memory_nbytes=most, n_loads=most, read_nbytes=most) for s in status.stores]
    sessions = [replace(s, n_hits=most, n_misses=most, read_nbytes=most, waited_s=1e9) for s in status.sessions]

    data = encode(replace(status, stores=tuple(stores), sessions=tuple(sessions)))

    assert len(data) > 1 << 15
