"""What happens a second follows from two statuses and the daemon's own clock; what cannot be compared has no rates."""

from dataclasses import replace

import pytest

from expertd.rates import Rates, SessionRates, StoreRates
from protocol.messages import SessionStatus, Status, StoreState, StoreStatus

DIGEST = "ab" * 32
STORE = StoreStatus(
    DIGEST, "/m", StoreState.READY, 10, 10, 1.0, 8, 0, (), 1, None, n_slots=4, n_loads=100, read_nbytes=1000
)
SESSION = SessionStatus(7, "0.1.0", 20.0, DIGEST, n_hits=50, n_misses=10, read_nbytes=600, waited_s=3.0)


def status(
    age_s: float = 100.0, *, pid: int = 1, store: StoreStatus = STORE, sessions: tuple[SessionStatus, ...] = (SESSION,)
) -> Status:
    return Status(pid, "0.1.0", age_s, 0, 0, 0, 0, (store,), sessions)


def test_counts_become_rates_by_the_daemons_clock() -> None:
    store = replace(STORE, n_loads=110, read_nbytes=3000)
    session = replace(SESSION, age_s=22.0, n_hits=90, n_misses=30, read_nbytes=1000, waited_s=3.5)
    rates = Rates(status(), status(102.0, store=store, sessions=(session,)))

    assert rates.of_store(store) == StoreRates(loads=5.0, read_nbytes=1000.0)
    assert rates.of_session(session) == SessionRates(hits=20.0, misses=10.0, read_nbytes=200.0, waited=0.25)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, status(102.0)),
        (status(), status(102.0, pid=2)),  # another daemon
        (status(), status(100.0)),  # no time has passed
    ],
)
def test_without_two_looks_at_one_daemon_there_are_no_rates(before: Status | None, after: Status) -> None:
    rates = Rates(before, after)

    assert rates.of_store(STORE) is None
    assert rates.of_session(SESSION) is None


def test_a_new_store_and_one_that_began_anew_have_no_rates() -> None:
    other = replace(STORE, digest="cd" * 32)
    anew = replace(STORE, n_loads=3)

    assert Rates(status(), status(102.0, store=other)).of_store(other) is None
    assert Rates(status(), status(102.0, store=anew)).of_store(anew) is None


def test_a_new_session_of_the_same_process_is_another_one() -> None:
    old, new = replace(SESSION, age_s=22.0, n_hits=60), replace(SESSION, age_s=1.0, n_hits=55)
    rates = Rates(status(), status(102.0, sessions=(old, new)))

    known, unknown = rates.of_session(old), rates.of_session(new)

    assert known is not None
    assert known.hits == 5.0
    assert unknown is None
