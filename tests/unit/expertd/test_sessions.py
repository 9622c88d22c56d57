"""The table of sessions."""

from pathlib import Path

from expertd.sessions import SessionTable
from expertd.stores import HeldStore
from protocol.fdpass import Credentials

PEER = Credentials(10, 1000)


def test_a_session_is_found_by_its_token_from_hello_to_its_end() -> None:
    table = SessionTable()
    session = table.open(PEER, 0.0)

    before = table.with_token(b"t", PEER)
    table.welcome(session, b"t", "0.1.0")
    during = table.with_token(b"t", PEER)
    table.close(session)
    after = table.with_token(b"t", PEER)

    assert (before, during, after) == (None, session, None)
    assert len(table) == 0


def test_closing_a_session_twice_leaves_the_others_alone() -> None:
    table = SessionTable()
    first, second = table.open(PEER, 0.0), table.open(PEER, 0.0)

    table.close(first)
    table.close(first)

    assert list(table) == [second]


def test_two_sessions_of_one_process_are_two() -> None:
    table = SessionTable()

    first, second = table.open(PEER, 0.0), table.open(PEER, 0.0)

    assert first is not second
    assert first.session_id != second.session_id


def test_only_who_attached_to_a_store_counts_for_it() -> None:
    table = SessionTable()
    one, other = table.open(PEER, 0.0), table.open(PEER, 0.0)
    mapped, unloaded = HeldStore("a", Path("/store")), HeldStore("a", Path("/store"))
    one.store = mapped
    other.store = unloaded

    attached = table.attached_to(mapped)

    assert attached == [one]


def test_a_session_that_said_hello_is_never_overdue() -> None:
    table = SessionTable()
    silent, polite = table.open(PEER, 0.0), table.open(PEER, 0.0)
    table.welcome(polite, b"t", "0.1.0")

    overdue = table.overdue(100.0, 5.0)

    assert overdue == [silent]
