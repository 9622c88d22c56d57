"""What people and programs read of a daemon."""

import json

from expertd.show import status_json, status_text
from protocol.handles import ExpertKey
from protocol.messages import Code, Refused, SessionStatus, Status, StoreState, StoreStatus

DIGEST = "ab" * 32
READY = StoreStatus(
    digest=DIGEST,
    path="/models/mixtral",
    state=StoreState.READY,
    nbytes=4_000_000_000,
    loaded_nbytes=4_000_000_000,
    load_s=2.0,
    n_experts=256,
    n_corrupt=1,
    corrupt=(ExpertKey(3, 4),),
    n_sessions=1,
    error=None,
)
FAILED = StoreStatus(
    "cd" * 32, "/broken", StoreState.FAILED, 0, 0, 0.0, 0, 0, (), 0, Refused(Code.STORE_INVALID, "cut")
)


def status(*stores: StoreStatus, sessions: tuple[SessionStatus, ...] = (), n_bad: int = 0) -> Status:
    return Status(77, "0.1.0", 3725.0, 30_000_000, 4_000_000_000, 9_000_000_000, n_bad, stores, sessions)


def test_an_empty_daemon_says_so() -> None:
    text = status_text(status())

    assert "pid 77" in text
    assert "up 1 h 02 min" in text
    assert "stores: none" in text
    assert "sessions: none" in text
    assert "bad messages" not in text


def test_a_store_shows_state_size_rate_and_what_is_corrupt() -> None:
    text = status_text(status(READY))

    assert "/models/mixtral [ready] 4.00 GB" in text
    assert "2.00 GB/s" in text
    assert "1 of 256 experts are corrupt and not served: layers.3.experts.4" in text


def test_a_failed_store_shows_why() -> None:
    text = status_text(status(FAILED, n_bad=3))

    assert "[failed]" in text
    assert "cut (store_invalid)" in text
    assert "bad messages: 3" in text


def test_only_attached_sessions_are_shown_to_people() -> None:
    sessions = (SessionStatus(1234, "0.1.0", 65.0, DIGEST), SessionStatus(4321, "0.1.0", 1.0, None))

    text = status_text(status(READY, sessions=sessions))

    assert "pid 1234, version 0.1.0, store abababababab, for 1 min 05 s" in text
    assert "4321" not in text


def test_a_program_gets_everything_as_json() -> None:
    sessions = (SessionStatus(1234, "0.1.0", 65.0, DIGEST), SessionStatus(4321, "0.1.0", 1.0, None))

    document = json.loads(json.dumps(status_json(status(READY, FAILED, sessions=sessions))))

    assert document["running"] is True
    assert [store["state"] for store in document["stores"]] == ["ready", "failed"]
    assert document["stores"][0]["corrupt"] == [[3, 4]]
    assert document["stores"][1]["error"] == {"code": "store_invalid", "detail": "cut"}
    assert [session["pid"] for session in document["sessions"]] == [1234, 4321]
