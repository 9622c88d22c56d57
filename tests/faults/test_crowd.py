"""Four runners, one of them killed every other second while the others decode: no token changes, nothing is left."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import pytest

from expertd.store import read_manifest
from tests.support.crowd import Crowd, crowd, undisturbed_texts, wrong_texts
from tests.support.daemon import DaemonProcess
from tests.support.frozen import settled_fds
from tests.support.small_stores import make_small_store
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_until

N_RUNNERS_A_STORE = 2
N_SLOTS = 10  # for 32 experts
KILL_EVERY_S = 2.0
GROWTH_NBYTES_MAX = 4 << 20


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stores of one model, which ends no text early: its ends of sequence are tokens that it does not have."""
    return [
        make_small_store(
            tmp_path_factory.mktemp("crowd"),
            files={"generation_config.json": b'{"eos_token_id": %d}' % eos},
            vocab=258,
            n_layers=4,
            n_experts=8,
        ).path
        for eos in (99998, 99999)
    ]


def kill_in_turn(crowds: Sequence[Crowd], rng: random.Random, seconds: float) -> None:
    """Kill a runner at random every KILL_EVERY_S for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        Event().wait(KILL_EVERY_S)
        rng.choice(crowds).kill_one()


@pytest.mark.parametrize("seconds", [30.0, pytest.param(300.0, marks=pytest.mark.slow)], ids=["30s", "5min"])
def test_runners_killed_in_turn_change_no_token_of_the_others(
    daemon: DaemonProcess, stores: list[Path], tmp_path: Path, seconds: float
) -> None:
    """Two over a store in memory, two over slots of the same model: what a dead one had leased is missed at once."""
    resident, tiered = stores
    daemon.load(resident, read_manifest(resident).digest)
    load_tiered(daemon, tiered, read_manifest(tiered), n_slots=N_SLOTS)
    expected = undisturbed_texts(resident)
    wait_until(lambda: daemon.sessions() == 0, "its session to end")
    fds, private_nbytes = settled_fds(daemon), daemon.private_nbytes()

    with (
        crowd(resident, tmp_path / "resident", seed=int(seconds)) as in_memory,
        crowd(tiered, tmp_path / "tiered", seed=int(seconds) + 1) as over_slots,
    ):
        crowds = (in_memory, over_slots)
        for gathered in crowds:
            gathered.begin(N_RUNNERS_A_STORE)
        kill_in_turn(crowds, random.Random(int(seconds)), seconds)
        complaints = [complaint for gathered in crowds for complaint in gathered.end()]
        texts = [gathered.texts() for gathered in crowds]
        n_killed = [len(gathered.former) for gathered in crowds]
    wait_until(lambda: daemon.sessions() == 0, "all sessions to end")

    assert len(set(expected.values())) == len(expected)
    assert sum(n_killed) >= seconds / KILL_EVERY_S / 2
    assert complaints == []
    assert [len(of_crowd) > 2 * n for of_crowd, n in zip(texts, n_killed, strict=True)] == [True, True]
    assert [wrong_texts(of_crowd, expected) for of_crowd in texts] == [[], []]
    assert settled_fds(daemon) == fds
    assert daemon.private_nbytes() - private_nbytes < GROWTH_NBYTES_MAX
    assert [store.n_sessions for store in daemon.status().stores] == [0, 0]
    assert sum(session.n_leases for session in daemon.status().sessions) == 0
