"""What people and programs read of a daemon."""

import json
from dataclasses import replace

import pytest

from expertd.rates import Rates
from expertd.show import status_json, status_text, top_text
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
TIERED = replace(
    READY, digest="ef" * 32, path="/models/large", nbytes=1_000_000_000, n_corrupt=0, corrupt=(),
    memory_nbytes=1_200_000_000, n_slots=64, slot_nbytes=15_000_000, n_used_slots=60, n_pinned=5, n_loads=300,
    read_nbytes=9_000_000_000,
)  # fmt: skip
FAILED = StoreStatus(
    "cd" * 32, "/broken", StoreState.FAILED, 0, 0, 0.0, 0, 0, (), 0, Refused(Code.STORE_INVALID, "cut")
)


def status(*stores: StoreStatus, sessions: tuple[SessionStatus, ...] = (), n_bad: int = 0) -> Status:
    return Status(77, "0.1.0", 3725.0, 30_000_000, 4_000_000_000, 9_000_000_000, n_bad, stores, sessions)


def cells(text: str, first: str) -> dict[str, str]:
    """Return the row that begins with that word, by the titles of its table."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(first) and ": " not in line)
    titles = next(line for line in reversed(lines[:at]) if line.lstrip().startswith(("store ", "pid ")))
    words = [word.strip() for word in lines[at].split("  ") if word.strip()]
    return dict(zip([word.strip() for word in titles.split("  ") if word.strip()], words, strict=True))


def test_an_empty_daemon_says_so() -> None:
    text = status_text(status())

    assert "pid 77" in text
    assert "up 1 h 02 min" in text
    assert "no stores" in text
    assert "no sessions" in text
    assert "bad messages" not in text


def test_a_resident_store_shows_state_size_rate_and_what_is_corrupt() -> None:
    text = status_text(status(READY))

    row = cells(text, "/models/mixtral")
    assert (row["state"], row["memory"], row["budget"], row["slots"]) == ("ready", "4.00 GB", "-", "all in memory")
    assert row["corrupt"] == row["sessions"] == "1"
    assert "2.00 GB/s" in text
    assert "1 of 256 experts are corrupt and not served: layers.3.experts.4" in text


def test_a_store_larger_than_its_memory_shows_budget_slots_and_what_was_read() -> None:
    text = status_text(status(TIERED))

    row = cells(text, "/models/large")
    assert (row["memory"], row["budget"], row["slots"]) == ("1.00 GB", "1.20 GB", "60/64")
    assert (row["pinned"], row["loads"], row["read"]) == ("5", "300", "9.00 GB")
    assert "slots of 15.0 MB" in text
    assert "GB/s" not in text


def test_a_failed_store_shows_why() -> None:
    text = status_text(status(FAILED, n_bad=3))

    assert cells(text, "/broken")["state"] == "failed"
    assert "cut (store_invalid)" in text
    assert "bad messages: 3" in text


def test_only_attached_sessions_are_shown_to_people_with_model_leases_and_hit_ratio() -> None:
    session = SessionStatus(
        1234, "0.1.0", 65.0, TIERED.digest, 2, n_hits=30, n_misses=10, read_nbytes=2 * 10**9, waited_s=1
    )
    asking = SessionStatus(4321, "0.1.0", 1.0, None)

    text = status_text(status(TIERED, sessions=(session, asking)))

    row = cells(text, "1234")
    assert (row["model"], row["version"], row["age"]) == ("large", "0.1.0", "1 min 05 s")
    assert (row["leases"], row["hits"], row["misses"], row["hit ratio"]) == ("2", "30", "10", "75.0%")
    assert (row["read"], row["waited"]) == ("2.00 GB", "1.0 s")
    assert "4321" not in text


def test_a_session_without_slots_has_no_hit_ratio_and_one_without_a_store_its_digest() -> None:
    sessions = (SessionStatus(1234, "0.1.0", 65.0, DIGEST), SessionStatus(1235, "0.1.0", 65.0, "99" * 32))

    text = status_text(status(READY, sessions=sessions))

    assert cells(text, "1234")["hit ratio"] == "-"
    assert cells(text, "1235")["model"] == "999999999999"


def test_top_shows_rates_between_two_looks() -> None:
    session = SessionStatus(1234, "0.1.0", 65.0, TIERED.digest, n_hits=30)
    later = SessionStatus(1234, "0.1.0", 67.0, TIERED.digest, n_hits=90, waited_s=1.0)
    before = status(TIERED, sessions=(session,))
    after = replace(status(replace(TIERED, read_nbytes=9_500_000_000), sessions=(later,)), age_s=before.age_s + 2.0)

    first, second = (top_text(now, Rates(former, now), 200, 50) for former, now in ((None, before), (before, after)))

    assert cells(first, "1234")["hits/s"] == "-"
    row = cells(second, "1234")
    assert (row["hits/s"], row["misses/s"], row["waiting"]) == ("30.0", "0.0", "50%")
    assert cells(second, "/models/large")["read/s"] == "250.0 MB"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [1, 5, 24])
def test_top_fits_any_terminal(width: int, height: int) -> None:
    sessions = tuple(SessionStatus(1000 + i, "0.1.0", 65.0, DIGEST) for i in range(40))
    now = status(READY, TIERED, FAILED, sessions=sessions, n_bad=3)

    lines = top_text(now, Rates(None, now), width, height).splitlines()

    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("…")


def test_a_narrow_terminal_keeps_what_matters() -> None:
    session = SessionStatus(1234, "0.1.0", 65.0, TIERED.digest, n_hits=30)
    now = status(TIERED, sessions=(session,))

    text = top_text(now, Rates(None, now), 40, 24)

    assert {"store", "state", "memory", "read/s"} <= set(cells(text, "/models/large"))
    assert {"pid", "model"} <= set(cells(text, "1234"))


def test_a_program_gets_everything_as_json() -> None:
    sessions = (SessionStatus(1234, "0.1.0", 65.0, DIGEST), SessionStatus(4321, "0.1.0", 1.0, None))

    document = json.loads(json.dumps(status_json(status(READY, FAILED, sessions=sessions))))

    assert document["running"] is True
    assert [store["state"] for store in document["stores"]] == ["ready", "failed"]
    assert document["stores"][0]["corrupt"] == [[3, 4]]
    assert document["stores"][1]["error"] == {"code": "store_invalid", "detail": "cut"}
    assert [session["pid"] for session in document["sessions"]] == [1234, 4321]
