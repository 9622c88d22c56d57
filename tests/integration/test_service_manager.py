"""The daemon as a service: what it says to its manager, and the stores it finds again through it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import StoreState
from protocol.runtime_dir import RuntimeDir
from protocol.segment import make_segment
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.segments import SEALED, segments_of
from tests.support.service_manager import FakeManager
from tests.support.stores import EXPERTS_FILE, dense_damaged
from tests.support.tiers import load_tiered, memory_for
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


@pytest.fixture
def manager(runtime: RuntimeDir) -> Iterator[FakeManager]:
    """A manager that keeps nothing yet."""
    fake = FakeManager(runtime.path.parent)
    yield fake
    fake.close()


def expert(store: Path) -> bytes:
    """Return one expert's bytes as a runner sees them."""
    with attach(store, NO_AUTOSTART) as attached:
        return bytes(attached.expert_record(ExpertKey(1, 2)))


def test_a_killed_service_finds_its_stores_with_the_manager(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    """The experts' file is gone when the second one starts: what it serves it cannot have read."""
    with manager.service(runtime, str(store)) as first:
        wait_until(lambda: len(manager.kept) == 1 + 1 + 2, "label, catalogue and segments to be kept")
        before, record = segments_of(first.pid), expert(store)
        first.kill()
    (store / EXPERTS_FILE).rename(store / "elsewhere")

    with manager.service(runtime, str(store)) as second:
        after, record_again = segments_of(second.pid), expert(store)
        held = second.store(manifest.digest)

    assert record_again == record
    assert (held.state, held.path) == (StoreState.READY, str(store))
    if os.geteuid() == 0:
        assert before == after


def test_a_killed_service_finds_what_is_sealed_of_a_store_with_slots(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    """On disk the dense weights are damaged when the second one starts: who reads them refuses the store."""
    with manager.service(runtime) as first:
        load_tiered(first, store, manifest, n_slots=4, pinned=(ExpertKey(0, 1),))
        wait_until(lambda: len(manager.kept) == 1 + 1 + 2, "label, catalogue, dense weights and pinned experts")
        before = segments_of(first.pid, named=SEALED)
        first.kill()

    with dense_damaged(store, manifest), manager.service(runtime) as second:
        wait_until(lambda: second.store(manifest.digest).state is not StoreState.LOADING, "the slots")
        held = second.store(manifest.digest)
        after = segments_of(second.pid, named=SEALED)
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept again")

    assert (held.state, held.path, held.n_slots, held.n_pinned) == (StoreState.READY, str(store), 4, 1)
    assert held.memory_nbytes == memory_for(manifest, 4, (ExpertKey(0, 1),))
    assert before == after


def test_a_service_that_is_told_to_load_a_store_with_slots_goes_on_from_what_was_kept_of_it(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    """As a unit does at each start. On disk the dense weights are damaged then: who reads them refuses the store."""
    order = (str(store), "--memory", str(memory_for(manifest, 4)))
    with manager.service(runtime, *order) as first:
        wait_until(lambda: len(manager.kept) == 1 + 1 + 1, "label, catalogue and dense weights to be kept")
        before = segments_of(first.pid, named=SEALED)
        first.kill()

    with dense_damaged(store, manifest), manager.service(runtime, *order) as second:
        (held,) = second.status().stores
        after = segments_of(second.pid, named=SEALED)

    assert (held.state, held.n_slots) == (StoreState.READY, 4)
    assert before == after


def test_a_store_that_was_loaded_later_is_found_again_with_its_path(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with manager.service(runtime) as first:
        first.load(store, manifest.digest)
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept")
        first.kill()

    with manager.service(runtime) as second:
        held = second.store(manifest.digest)

    assert (held.state, held.path) == (StoreState.READY, str(store))


def test_an_unloaded_store_is_kept_no_longer(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with manager.service(runtime, str(store)) as daemon:
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept")
        with daemon.client() as client:
            client.ask(m.Unload(manifest.digest), m.Unloaded)

        wait_until(lambda: not manager.kept, "the store to be let go")
        alive = daemon.is_alive()

    assert alive


def test_kept_segments_with_wrong_bytes_are_let_go_and_the_store_is_read_again(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with manager.service(runtime, str(store)) as first:
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept")
        record = expert(store)
        first.kill()
    name = f"expertd-{manifest.digest}-2"
    size = os.fstat(manager.kept[name]).st_size
    os.close(manager.kept[name])
    manager.kept[name] = make_segment("expertd-store", bytes(size))

    with manager.service(runtime, str(store)) as second:
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept")
        record_again, log = expert(store), second.log

    assert record_again == record
    assert "its checksum is wrong" in log
    assert f"store loaded digest={manifest.digest[:12]}" in log.split("not adopted")[1]
    assert os.pread(manager.kept[name], size, 0) != bytes(size)


def test_a_store_that_was_kept_in_part_is_let_go(
    manager: FakeManager, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with manager.service(runtime, str(store)) as first:
        wait_until(lambda: len(manager.kept) == 4, "the store to be kept")
        first.kill()
    os.close(manager.kept.pop(f"expertd-{manifest.digest}-0"))

    with manager.service(runtime) as second:
        wait_until(lambda: not manager.kept, "the rest to be let go")
        stores = second.status().stores

    assert stores == ()


def test_the_manager_hears_what_goes_on_and_that_the_daemon_lives(
    manager: FakeManager, runtime: RuntimeDir, store: Path
) -> None:
    with manager.service(runtime, str(store), watchdog_s=0.2) as daemon:
        wait_until(lambda: manager.said.count("WATCHDOG=1") > 3, "the watchdog to be fed")
        nbytes = read_manifest(store).experts_nbytes + read_manifest(store).dense_nbytes
        wait_until(lambda: manager.has_heard(f"STATUS=1 store(s), {nbytes / 1e9:.2f} GB in memory"), "its status")
        daemon.process.send_signal(signal.SIGTERM)
        code = daemon.process.wait(20)

    assert code == 0
    assert manager.said[-1] == "STOPPING=1"


def test_a_manager_that_is_gone_holds_nobody_up(manager: FakeManager, runtime: RuntimeDir, store: Path) -> None:
    with manager.service(runtime) as daemon:
        Path(manager.address).rename(manager.address + ".gone")
        status = daemon.load(store, read_manifest(store).digest)
        Path(manager.address + ".gone").rename(manager.address)

    assert status.state is StoreState.READY
