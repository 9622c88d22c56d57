"""An attached store: equal to the files, shared once, and closed to every writer."""

import faulthandler
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Unloaded
from protocol.runtime_dir import RuntimeDir
from runner.client import AttachedStore, attach
from runner.config import RunnerConfig
from runner.errors import StoreInvalid, StoreUnavailable
from tests.support.client_process import client_at
from tests.support.daemon import DaemonProcess, background_pid, status_nbytes, stop_background_daemon
from tests.support.segments import is_held, segments_of, segments_of_all
from tests.support.stores import EXPERTS_FILE, write_random_store
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


def test_an_attached_store_equals_its_files(loaded: DaemonProcess, store: Path, manifest: Manifest) -> None:
    data = (store / EXPERTS_FILE).read_bytes()

    with attach(store, NO_AUTOSTART) as attached:
        records = {key: bytes(attached.expert_record(key)) for key in manifest.experts}
        dense = {name: bytes(attached.dense_record(name)) for name in manifest.dense}

    assert records == {key: data[r.offset : r.offset + r.nbytes] for key, r in manifest.experts.items()}
    for name, record in manifest.dense.items():
        assert dense[name] == (store / record.file).read_bytes()[record.offset : record.offset + record.nbytes]
    assert loaded.is_alive()


def test_the_session_lasts_as_long_as_the_store(loaded: DaemonProcess, store: Path, manifest: Manifest) -> None:
    with attach(store, NO_AUTOSTART):
        during = loaded.store(manifest.digest).n_sessions
    wait_until(lambda: loaded.store(manifest.digest).n_sessions == 0, "the session to end")

    assert during == 1


def test_a_view_outlives_the_session_and_the_daemon(loaded: DaemonProcess, store: Path) -> None:
    with attach(store, NO_AUTOSTART) as attached:
        view = attached.expert_record(ExpertKey(1, 3))
        expected = bytes(view)

    loaded.kill()

    assert bytes(view) == expected


def test_a_side_file_is_checked(loaded: DaemonProcess, store: Path) -> None:
    with attach(store, NO_AUTOSTART) as attached:
        config = attached.side_file("config.json")
        nothing = attached.side_file("tokenizer.json")

    assert config == (store / "config.json").read_bytes()
    assert nothing is None
    assert loaded.is_alive()


def test_without_a_daemon_and_without_autostart_one_line_says_what_to_do(store: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no expertd runs; `expertd start"):
        attach(store, NO_AUTOSTART)


def test_what_is_no_store_starts_no_daemon(runtime: RuntimeDir, tmp_path: Path) -> None:
    with pytest.raises(StoreInvalid, match="missing"):
        attach(tmp_path, RunnerConfig())

    assert not runtime.path.exists()


def test_attach_starts_the_daemon_that_is_needed(runtime: RuntimeDir, store: Path) -> None:
    with attach(store, RunnerConfig()) as first:
        pid = background_pid(runtime)
        with attach(store, RunnerConfig()) as second:
            started = (first.started_daemon, second.started_daemon)
    stop_background_daemon(runtime)

    assert pid is not None
    assert started == (True, False)


def test_attach_loads_a_store_that_was_unloaded(
    loaded: DaemonProcess, runtime: RuntimeDir, store: Path, manifest: Manifest
) -> None:
    with loaded.client() as client:
        client.ask(m.Unload(manifest.digest), Unloaded)

    with attach(store, RunnerConfig()) as attached:
        record = bytes(attached.expert_record(ExpertKey(0, 0)))

    assert record == (store / EXPERTS_FILE).read_bytes()[manifest.experts[ExpertKey(0, 0)].offset :][: len(record)]
    assert background_pid(runtime) == loaded.pid


def test_a_write_into_the_mapping_ends_the_writer_and_changes_nothing(loaded: DaemonProcess, store: Path) -> None:
    with attach(store, NO_AUTOSTART) as attached:
        view = attached.expert_record(ExpertKey(0, 0))
        before = bytes(view)
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            view[0] = before[0] ^ 1
            os._exit(0)
        _, status = os.waitpid(pid, 0)

        assert os.WIFSIGNALED(status)
        assert bytes(view) == before
    assert loaded.is_alive()


@pytest.mark.parametrize("n_clients", [1, 2, 4])
def test_a_store_is_in_memory_once_however_many_attach(daemon: DaemonProcess, tmp_path: Path, n_clients: int) -> None:
    """A store of 39 MB: one set of segments for all, which every client maps whole, and no copy of its own."""
    written = write_random_store(tmp_path / "big", hidden=512, intermediate=1024, n_layers=4, n_experts=12)
    nbytes = written.experts_nbytes + written.dense_nbytes
    daemon.load(tmp_path / "big", written.digest)

    with ExitStack() as clients:
        pids = [clients.enter_context(client_at("attached", tmp_path / "big")).pid for _ in range(n_clients)]
        shared_nbytes = sum(segments_of_all(daemon, *pids).values())
        each_maps = {sum(segments_of(pid).values()) for pid in pids}
        private_nbytes = [status_nbytes(pid, "RssAnon") for pid in pids]

    assert nbytes > 39e6
    assert nbytes <= shared_nbytes < nbytes * 1.1
    assert all(nbytes <= mapped_nbytes <= shared_nbytes for mapped_nbytes in each_maps)
    assert max(private_nbytes) < 0.7 * nbytes


def test_the_memory_of_an_unloaded_store_is_free_when_its_last_client_ends(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    written = write_random_store(tmp_path / "big", hidden=512, intermediate=1024, n_layers=4, n_experts=12)
    daemon.load(tmp_path / "big", written.digest)

    with client_at("attached", tmp_path / "big") as client:
        with daemon.client() as admin:
            admin.ask(m.Unload(written.digest), Unloaded)
        while_mapped = segments_of_all(daemon, client.pid)

    assert sum(while_mapped.values()) >= written.experts_nbytes
    wait_until(lambda: daemon.status().stores == (), "the orphan to be forgotten")
    wait_until(lambda: not is_held(daemon, while_mapped), "the memory to be free")


def test_a_store_attached_twice_in_one_process_is_two_sessions(
    loaded: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    with attach(store, NO_AUTOSTART) as first, attach(store, NO_AUTOSTART) as second:
        n_sessions = loaded.store(manifest.digest).n_sessions
        same = bytes(first.expert_record(ExpertKey(0, 1))) == bytes(second.expert_record(ExpertKey(0, 1)))

    assert isinstance(first, AttachedStore)
    assert (n_sessions, same) == (2, True)
