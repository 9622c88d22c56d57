"""The daemon killed and frozen at every step of its life: clients are told, nothing is kept, the next start works."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.errors import DaemonUnavailable
from protocol.fault_points import FaultPoint
from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from tests.faults.test_slot_steps import DAEMON_STEPS
from tests.support.daemon import DaemonProcess, launched_daemon, running_daemon
from tests.support.frozen import is_frozen, settled_fds, thaw, wait_until_frozen
from tests.support.segments import segments_of
from tests.support.stores import write_random_store
from tests.support.visit import NOTHING, visit
from tests.support.waiting import wait_readable, wait_until

CLOSED = "expertd closed the connection"
ABSENT = "no expertd runs"
SILENT = "expertd did not answer in time"
# How long a client that comes while the daemon is frozen waits.
SILENCE_S = 0.3
GROWTH_NBYTES_MAX = 2 << 20


@dataclass(frozen=True)
class Step:
    """The nth passage of a point; what a client is told when the daemon dies there, and when it freezes there."""

    point: FaultPoint
    when_killed: str
    when_frozen: str = SILENT
    nth: int = 1
    holds_segments: bool = False
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.point}@{self.nth}"

    @property
    def fault(self) -> str:
        return f"{self.point}=stop@{self.nth}"


# A visitor's messages: Hello, Load, GetStatus until the store is loaded, Attach, Unload.
START = (
    Step(FaultPoint.DAEMON_LOCKED, ABSENT, ABSENT),
    Step(FaultPoint.DAEMON_CONTROL_BOUND, ABSENT),
    Step(FaultPoint.DAEMON_REQUESTS_BOUND, ABSENT),
    Step(FaultPoint.DAEMON_READY, ABSENT),
)
SESSION = (
    Step(FaultPoint.DAEMON_ACCEPTED, CLOSED),
    Step(FaultPoint.DAEMON_MESSAGE_RECEIVED, CLOSED),
    Step(FaultPoint.DAEMON_REPLY_SENT, CLOSED),
    Step(FaultPoint.DAEMON_MESSAGE_RECEIVED, CLOSED, nth=2),
    Step(FaultPoint.DAEMON_REPLY_SENT, CLOSED, nth=2),
    Step(FaultPoint.DAEMON_FILES_OPENED, CLOSED),
    Step(FaultPoint.DAEMON_SEGMENT_POPULATED, CLOSED, holds_segments=True),
    Step(FaultPoint.DAEMON_RECORD_READING, CLOSED, nth=3, holds_segments=True),
    Step(FaultPoint.DAEMON_SEGMENT_FILLED, CLOSED, nth=2, holds_segments=True),
    Step(FaultPoint.DAEMON_SEGMENTS_SEALED, CLOSED, holds_segments=True),
    Step(FaultPoint.DAEMON_STORE_LOADED, CLOSED, holds_segments=True),
    Step(FaultPoint.DAEMON_REQUEST_RECEIVED, CLOSED, holds_segments=True),
    Step(FaultPoint.DAEMON_REQUEST_ANSWERED, CLOSED, holds_segments=True),
    Step(FaultPoint.DAEMON_SESSION_ENDING, NOTHING),
)
END = (
    Step(FaultPoint.DAEMON_DRAINING, NOTHING, stops=True),
    Step(FaultPoint.DAEMON_SOCKETS_CLOSED, NOTHING, ABSENT, stops=True),
)


@dataclass(frozen=True)
class Undisturbed:
    """What a daemon holds after visits that nobody disturbed."""

    fds: Counter[str]
    private_nbytes: int


@pytest.fixture(scope="module")
def undisturbed(short_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    digest = write_random_store(store).digest
    directory = RuntimeDir(short_tmp / "undisturbed" / "run")
    with running_daemon(directory) as daemon:
        assert {visit(directory, store, digest) for _ in range(3)} == {NOTHING}
        wait_until(lambda: daemon.sessions() == 0, "the sessions to end")
        return Undisturbed(settled_fds(daemon), daemon.private_nbytes())


@contextmanager
def frozen_daemon(
    directory: RuntimeDir, step: Step, store: Path, digest: str
) -> Iterator[tuple[DaemonProcess, "Future[str]"]]:
    """Give a daemon that stands at that step and what a visitor, who made it come there or came later, will be told."""
    with launched_daemon(directory, fault=step.fault) as (daemon, ready), ThreadPoolExecutor(1) as pool:
        if step not in START:
            wait_readable(ready, "the daemon to be ready")
            assert os.read(ready, 1) == b"R"
        else:
            wait_until_frozen(daemon.pid)
        told = pool.submit(visit, directory, store, digest, stops=step.stops)
        wait_until_frozen(daemon.pid)
        try:
            yield daemon, told
        finally:
            if daemon.is_alive() and is_frozen(daemon.pid):
                thaw(daemon.pid)


@pytest.mark.parametrize("step", [*SESSION, *END], ids=str)
def test_a_daemon_killed_at_a_step_is_told_of_and_leaves_nothing(
    runtime: RuntimeDir, store: Path, manifest: Manifest, step: Step
) -> None:
    with frozen_daemon(runtime, step, store, manifest.digest) as (daemon, told):
        held = segments_of(daemon.pid)
        daemon.kill()
        was_told = told.result()
    left = segments_of(*all_pids())

    with running_daemon(runtime):
        next_told = visit(runtime, store, manifest.digest)

    assert was_told == step.when_killed
    assert held or not step.holds_segments or os.geteuid() != 0  # who sees what the daemon holds
    assert not left.keys() & held.keys()
    assert next_told == NOTHING


@pytest.mark.parametrize("step", START, ids=str)
def test_a_daemon_killed_on_its_way_up_is_in_nobodys_way(
    runtime: RuntimeDir, store: Path, manifest: Manifest, step: Step
) -> None:
    with launched_daemon(runtime, fault=f"{step.point}=kill") as (daemon, _):
        code = daemon.process.wait(timeout=20)

    told = visit(runtime, store, manifest.digest)
    with running_daemon(runtime):
        next_told = visit(runtime, store, manifest.digest)

    assert code == -9
    assert told == step.when_killed
    assert next_told == NOTHING


@pytest.mark.parametrize("step", [*START, *SESSION], ids=str)
def test_a_frozen_daemon_is_waited_for_so_long_and_goes_on_as_if_nothing_had_been(
    runtime: RuntimeDir, store: Path, manifest: Manifest, undisturbed: Undisturbed, step: Step
) -> None:
    with frozen_daemon(runtime, step, store, manifest.digest) as (daemon, told):
        told_meanwhile = visit(runtime, store, manifest.digest, timeout_s=SILENCE_S)
        if step.when_frozen == ABSENT:
            told.result()  # before there is a daemon
        thaw(daemon.pid)
        first_told = told.result()
        wait_until(lambda: is_serving(daemon), "the daemon to go on")

        next_told = [visit(runtime, store, manifest.digest) for _ in range(2)]
        wait_until(lambda: daemon.sessions() == 0, "the sessions to end")
        fds, segments = settled_fds(daemon), segments_of(daemon.pid)
        grown = daemon.private_nbytes() - undisturbed.private_nbytes

    assert told_meanwhile.startswith(step.when_frozen)
    assert first_told == (ABSENT if step.when_frozen == ABSENT else NOTHING)
    assert next_told == [NOTHING, NOTHING]
    assert fds == undisturbed.fds
    assert segments == {}
    assert grown < GROWTH_NBYTES_MAX


@pytest.mark.parametrize("step", END, ids=str)
def test_a_daemon_frozen_on_its_way_down_ends_when_it_can(
    runtime: RuntimeDir, store: Path, manifest: Manifest, step: Step
) -> None:
    with frozen_daemon(runtime, step, store, manifest.digest) as (daemon, told):
        first_told = told.result()
        second_told = visit(runtime, store, manifest.digest, timeout_s=SILENCE_S)
        thaw(daemon.pid)
        code = daemon.process.wait(timeout=20)

    assert first_told == NOTHING
    assert second_told.startswith(step.when_frozen)
    assert code == 0
    assert not runtime.control_socket.exists()
    assert not runtime.request_socket.exists()


def test_every_point_of_the_daemon_is_among_the_steps() -> None:
    tested = {step.point for step in (*START, *SESSION, *END)} | {point for point, _ in DAEMON_STEPS}

    assert tested | {FaultPoint.DAEMON_OFFER_PROVEN} == {point for point in FaultPoint if point.startswith("daemon-")}


def is_serving(daemon: DaemonProcess) -> bool:
    """Whether it answers."""
    try:
        daemon.status()
    except DaemonUnavailable:
        return False
    return True


def all_pids() -> list[int]:
    """Return every process of the machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
