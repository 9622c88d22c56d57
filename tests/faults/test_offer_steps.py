"""A runner offers its store to the next daemon: either of them killed or frozen in the middle of it."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from protocol.fault_points import FaultPoint, arm
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from runner.client import AttachedStore, attach
from runner.config import RunnerConfig
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.frozen import is_frozen, thaw, wait_until_frozen
from tests.support.segments import SEALED, segments_of
from tests.support.stores import dense_damaged
from tests.support.tiers import load_tiered
from tests.support.waiting import wait_for_exit, wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
N_SLOTS = 4


@contextmanager
def orphaned(runtime: RuntimeDir, store: Path) -> Iterator[AttachedStore]:
    """Give an attached store whose daemon is dead."""
    with running_daemon(runtime, str(store)) as daemon, attach(store, NO_AUTOSTART) as attached:
        daemon.kill()
        yield attached


class Tending:
    """Tends an attached store, a second of its time each time."""

    def __init__(self, attached: AttachedStore) -> None:
        self._attached = attached
        self._now = 0.0

    def once(self) -> bool:
        self._now += 1.0
        self._attached.tend(self._now)
        return True


def is_frozen_after(tending: Tending, daemon: DaemonProcess) -> bool:
    return tending.once() and is_frozen(daemon.pid)


def n_sessions(daemon: DaemonProcess, digest: str) -> int:
    return next((store.n_sessions for store in daemon.status().stores if store.digest == digest), 0)


def test_a_daemon_killed_before_it_takes_an_offer_costs_the_runner_nothing(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with orphaned(runtime, store) as attached:
        tending, key = Tending(attached), ExpertKey(1, 1)
        record, held = bytes(attached.expert_record(key)), segments_of(os.getpid())
        with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_OFFER_PROVEN}=stop") as frozen:
            wait_until(lambda: is_frozen_after(tending, frozen), "the offer to be proven")
            frozen.kill()
        with running_daemon(runtime) as successor:
            wait_until(
                lambda: tending.once() and n_sessions(successor, manifest.digest) == 1, "the next daemon to take it"
            )
            taken = segments_of(successor.pid)

        assert bytes(attached.expert_record(key)) == record
    assert taken or os.geteuid() != 0  # who sees what the daemon holds
    assert taken.keys() <= held.keys()


def test_a_daemon_frozen_before_it_takes_an_offer_takes_it_when_it_goes_on(
    runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with orphaned(runtime, store) as attached:
        tending = Tending(attached)
        with running_daemon(runtime, fault=f"{FaultPoint.DAEMON_OFFER_PROVEN}=stop") as frozen:
            wait_until(lambda: is_frozen_after(tending, frozen), "the offer to be proven")
            for _ in range(3):
                tending.once()  # which blocks nobody
            thaw(frozen.pid)
            wait_until(lambda: tending.once() and n_sessions(frozen, manifest.digest) == 1, "the offer to be taken")


def test_a_runner_killed_behind_its_offer_leaves_nothing(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    """It is a fork of this process, which has done nothing with the store itself."""
    with running_daemon(runtime, str(store)) as daemon:
        pid = os.fork()
        if pid == 0:
            _offer_and_freeze(daemon.pid, store)
        wait_until(lambda: n_sessions(daemon, manifest.digest) == 1, "the runner to attach")
        daemon.kill()
    with running_daemon(runtime) as successor:
        wait_until_frozen(pid)
        wait_until(lambda: n_sessions(successor, manifest.digest) == 1, "the offer to be taken")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wait_until(lambda: n_sessions(successor, manifest.digest) == 0, "its session to end")

        assert successor.sessions() == 0
        assert segments_of(successor.pid) or os.geteuid() != 0
        assert not segments_of(os.getpid()).keys() & segments_of(successor.pid).keys()


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "frozen"])
def test_over_slots_a_daemon_that_does_not_take_the_offer_at_once_costs_the_runner_a_wait(
    runtime: RuntimeDir, store: Path, manifest: Manifest, *, dies: bool
) -> None:
    """On disk the dense weights are damaged: who reads them refuses the store."""
    with ExitStack() as stack:
        first = stack.enter_context(running_daemon(runtime))
        load_tiered(first, store, manifest, n_slots=N_SLOTS)
        attached = stack.enter_context(attach(store, NO_AUTOSTART))
        assert attached.host_slots is not None
        before = segments_of(os.getpid(), named=SEALED)
        first.kill()
        stack.enter_context(dense_damaged(store, manifest))
        frozen = stack.enter_context(running_daemon(runtime, fault=f"{FaultPoint.DAEMON_OFFER_PROVEN}=stop"))
        with ThreadPoolExecutor(1) as model:
            renewed = model.submit(attached.host_slots.renewed)
            wait_until_frozen(frozen.pid)
            if dies:
                frozen.kill()
                stack.enter_context(running_daemon(runtime))
            else:
                thaw(frozen.pid)
            slots = renewed.result()

        assert slots.n_slots == N_SLOTS
        assert segments_of(os.getpid(), named=SEALED) == before


def _offer_and_freeze(daemon_pid: int, store: Path) -> None:
    try:
        arm(f"{FaultPoint.CLIENT_OFFER_SENT}=stop")
        attached = attach(store, NO_AUTOSTART)
        wait_for_exit(daemon_pid)
        tending = Tending(attached)
        while tending.once():
            pass  # until it stands at its point
    finally:
        os._exit(1)
