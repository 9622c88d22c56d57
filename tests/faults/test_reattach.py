"""Runners outlive their daemon, and the next one finds the store with them: one copy, and nothing read."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol.messages import StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from runner.client import AttachedStore, attach
from runner.config import RunnerConfig
from runner.errors import StoreChanged
from tests.support.daemon import (
    DaemonProcess,
    background_pid,
    run_expertd,
    running_daemon,
    stop_background_daemon,
)
from tests.support.segments import segments_of
from tests.support.stores import EXPERTS_FILE, write_random_store
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


class Clock:
    """A clock that goes on by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def tick(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def big(runtime: RuntimeDir) -> Path:
    """The path of a store of 39 MB, more than a daemon reads to start."""
    path = runtime.path.parent / "big"
    write_random_store(path, hidden=512, intermediate=1024, n_layers=4, n_experts=12)
    return path


@contextmanager
def attached_then_killed(runtime: RuntimeDir, store: Path) -> Iterator[AttachedStore]:
    """Give an attached store whose daemon was killed."""
    with running_daemon(runtime, str(store)) as daemon, attach(store, NO_AUTOSTART) as attached:
        daemon.kill()
        yield attached


def tended(attached: AttachedStore, clock: Clock) -> bool:
    """Tend once; return True."""
    attached.tend(clock.tick())
    return True


def tend_until_attached(attached: AttachedStore, daemon: DaemonProcess, digest: str) -> None:
    """Tend until the daemon counts this process among those that use the store."""
    clock = Clock()

    def is_attached() -> bool:
        attached.tend(clock.tick())
        stores = {store.digest: store for store in daemon.status().stores}
        return digest in stores and stores[digest].n_sessions == 1

    wait_until(is_attached, "the store to be attached again")


def test_a_daemon_without_the_store_takes_it_from_who_maps_it(runtime: RuntimeDir, big: Path) -> None:
    manifest = read_manifest(big)
    with attached_then_killed(runtime, big) as attached:
        before = segments_of(os.getpid())
        (big / EXPERTS_FILE).rename(big / "elsewhere")
        with running_daemon(runtime) as daemon:
            tend_until_attached(attached, daemon, manifest.digest)
            held = daemon.store(manifest.digest)
            of_both = segments_of(os.getpid(), daemon.pid)

    assert (held.state, held.path, held.n_corrupt) == (StoreState.READY, str(big), 0)
    assert held.nbytes == manifest.experts_nbytes + manifest.dense_nbytes
    assert before.items() <= of_both.items()
    assert sum(of_both.values()) < held.nbytes * 1.1


def test_a_start_waits_for_who_maps_the_store_and_reads_nothing(runtime: RuntimeDir, big: Path) -> None:
    digest = read_manifest(big).digest
    with attached_then_killed(runtime, big) as attached:
        clock = Clock()
        with subprocess.Popen(
            [sys.executable, "-m", "expertd", "start", str(big)], stderr=subprocess.PIPE, text=True
        ) as start:
            wait_until(lambda: tended(attached, clock) and start.poll() is not None, "the start to end")
            assert start.stderr is not None
            said = start.stderr.read()
        pid = background_pid(runtime)
        of_both = segments_of(os.getpid(), pid or 0)
        log = runtime.log.read_text()
    stop_background_daemon(runtime)

    assert start.returncode == 0, said
    assert f"store offered digest={digest[:12]}" in log
    assert "store loaded" not in log
    assert sum(of_both.values()) < 39e6 * 1.1


def test_a_copy_that_was_read_anew_is_put_under_the_mapping(runtime: RuntimeDir, big: Path) -> None:
    """Nobody tends while the daemon loads, so it reads; afterwards there is one copy again, at the same addresses."""
    manifest = read_manifest(big)
    with attached_then_killed(runtime, big) as attached:
        views = {key: attached.expert_record(key) for key in manifest.experts}
        before = segments_of(os.getpid())
        with running_daemon(runtime) as daemon:
            daemon.load(big, manifest.digest)
            tend_until_attached(attached, daemon, manifest.digest)
            after = segments_of(os.getpid())
            data = (big / EXPERTS_FILE).read_bytes()
            same = all(
                bytes(view) == data[r.offset : r.offset + r.nbytes]
                for view, r in ((views[key], manifest.experts[key]) for key in views)
            )
            if os.geteuid() == 0:
                assert after == segments_of(daemon.pid)

    assert same
    assert before.keys().isdisjoint(after.keys())


def test_another_store_under_the_same_path_is_store_changed(runtime: RuntimeDir, store: Path) -> None:
    with attached_then_killed(runtime, store) as attached:
        store.rename(store.with_name("old"))
        write_random_store(store, seed=7)
        with running_daemon(runtime, str(store)) as daemon:
            clock = Clock()
            with pytest.raises(StoreChanged, match="another one now"):
                wait_until(lambda: not tended(attached, clock), "the change to be seen")
            alive = daemon.is_alive()

    assert alive


def test_a_store_that_was_unloaded_stays_unloaded_after_a_restart(runtime: RuntimeDir, store: Path) -> None:
    run_expertd("start", store)
    with attach(store, NO_AUTOSTART) as attached:
        run_expertd("unload", store)
        run_expertd("restart")
        clock = Clock()
        for _ in range(20):
            attached.tend(clock.tick())
        log = runtime.log.read_text()
        status = run_expertd("status", "--json").stdout
    stop_background_daemon(runtime)

    assert '"stores": []' in status
    assert "store offered" not in log


def test_a_frozen_daemon_costs_a_moment_and_is_found_when_it_thaws(runtime: RuntimeDir, store: Path) -> None:
    digest = read_manifest(store).digest
    with attached_then_killed(runtime, store) as attached, running_daemon(runtime) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        clock = Clock()
        for _ in range(3):
            attached.tend(clock.tick())
        daemon.process.send_signal(signal.SIGCONT)

        tend_until_attached(attached, daemon, digest)
        state = daemon.store(digest).state

    assert state is StoreState.READY


def test_descriptors_and_memory_are_back_to_base_after_ten_daemons(runtime: RuntimeDir, store: Path) -> None:
    digest = read_manifest(store).digest
    with attached_then_killed(runtime, store) as attached:
        fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number of names
        segments = segments_of(os.getpid())
        for _ in range(10):
            with running_daemon(runtime) as daemon:
                tend_until_attached(attached, daemon, digest)
                n_sessions = daemon.store(digest).n_sessions
                daemon.kill()
            assert n_sessions == 1
        attached.tend(1e9)

        assert segments_of(os.getpid()) == segments
        assert len(os.listdir("/proc/self/fd")) <= fds + 1  # noqa: PTH208


def test_many_offers_at_once_make_one_store(runtime: RuntimeDir, store: Path) -> None:
    digest = read_manifest(store).digest
    with running_daemon(runtime, str(store)) as dead:
        several = [attach(store, NO_AUTOSTART) for _ in range(5)]
        dead.kill()
    with running_daemon(runtime) as daemon:
        clock = Clock()

        def all_are_attached() -> bool:
            now = clock.tick()
            for attached in several:
                attached.tend(now)
            return [s.n_sessions for s in daemon.status().stores if isinstance(s, StoreStatus)] == [5]

        wait_until(all_are_attached, "all to be attached again")
        log = daemon.log
        for attached in several:
            attached.close()

    assert log.count("answer=Attached") == 1
    assert digest[:12] in log
