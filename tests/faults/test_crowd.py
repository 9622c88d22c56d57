"""Four runners, one of them killed every other second while the others decode: no token changes, nothing is left."""

import time
from pathlib import Path
from threading import Event

import pytest

from expertd.store import read_manifest
from protocol import messages as m
from tests.support.crowd import Crowd, crowd, undisturbed_texts, wrong_texts
from tests.support.daemon import DaemonProcess
from tests.support.frozen import settled_fds
from tests.support.small_stores import make_small_store
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

N_RUNNERS = 4
N_SLOTS = 10  # for 32 experts
GROWTH_NBYTES_MAX = 4 << 20


@pytest.fixture(scope="module")
def endless_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model ends no text early: its end of sequence is a token that it does not choose."""
    files = {"generation_config.json": b'{"eos_token_id": 257}'}
    return make_small_store(tmp_path_factory.mktemp("crowd"), files=files, vocab=258, n_layers=4, n_experts=8).path


def kill_in_turn(gathered: Crowd, seconds: float, every_s: float) -> int:
    """Kill one runner so often for so long; return how many were killed."""
    n_killed, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        Event().wait(every_s)
        gathered.kill_one()
        n_killed += 1
    return n_killed


@pytest.mark.parametrize("n_slots", [None, N_SLOTS], ids=["resident", "slots"])
@pytest.mark.parametrize("pace", [(6.0, 1.0), pytest.param((300.0, 2.0), marks=pytest.mark.slow)], ids=["6s", "5min"])
def test_runners_killed_in_turn_change_no_token_of_the_others(
    daemon: DaemonProcess, endless_store: Path, tmp_path: Path, pace: tuple[float, float], n_slots: int | None
) -> None:
    """With slots, what a dead runner had leased is missed by the others at once."""
    seconds, every_s = pace
    manifest = read_manifest(endless_store)
    digest = manifest.digest
    daemon.load(endless_store, digest)
    expected = undisturbed_texts(endless_store)
    if n_slots is not None:
        with daemon.client() as client:
            client.ask(m.Unload(digest), m.Unloaded)
        load_tiered(daemon, endless_store, manifest, n_slots=n_slots)
        assert undisturbed_texts(endless_store) == expected
    wait_until(lambda: daemon.sessions() == 0, "its session to end")
    fds, private_nbytes = settled_fds(daemon), daemon.private_nbytes()

    with crowd(endless_store, tmp_path / "crowd", seed=int(seconds)) as gathered:
        gathered.begin(N_RUNNERS)
        n_killed = kill_in_turn(gathered, seconds, every_s)
        complaints = gathered.end()
        texts = gathered.texts()
    wait_until(lambda: daemon.sessions() == 0, "all sessions to end")

    assert len(set(expected.values())) == len(expected)
    assert n_killed >= seconds / every_s / 2
    assert complaints == []
    assert len(texts) > 2 * n_killed
    assert wrong_texts(texts, expected) == []
    assert settled_fds(daemon) == fds
    assert daemon.private_nbytes() - private_nbytes < GROWTH_NBYTES_MAX
    assert daemon.store(digest).n_sessions == 0
    assert sum(session.n_leases for session in daemon.status().sessions) == 0
