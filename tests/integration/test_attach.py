"""An attached store: equal to the files, shared once, and closed to every writer."""

import ctypes
import faulthandler
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from protocol import messages as m
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Unloaded
from protocol.runtime_dir import RuntimeDir
from protocol.segment import map_segment
from runner.client import AttachedStore, attach
from runner.config import RunnerConfig
from runner.errors import StoreInvalid, StoreUnavailable
from tests.support.client_process import client_at
from tests.support.daemon import DaemonProcess, background_pid, status_nbytes, stop_background_daemon
from tests.support.foreign_memory import fails, process_vm_writev, segment_address
from tests.support.segments import is_held, segments_of, segments_of_all
from tests.support.stores import EXPERTS_FILE, write_random_store
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)


@pytest.fixture
def segment(loaded: DaemonProcess, manifest: Manifest) -> Iterator[int]:
    """The descriptor of the segment with the experts, as a client gets it."""
    with loaded.client() as client:
        fds = client.attach(manifest.digest)
        yield fds[-1]
        for fd in fds:
            os.close(fd)


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


def reopen_and_write(fd: int) -> None:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        os.pwrite(writable, b"x", 0)
    finally:
        os.close(writable)


def map_writable(fd: int) -> None:
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()


def truncate_reopened(fd: int) -> None:
    os.truncate(f"/proc/self/fd/{fd}", 4096)


def punch_hole(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, 0x01 | 0x02, 0, 4096):
        raise OSError(ctypes.get_errno(), "fallocate")


def protect_writable(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    view = map_segment(fd, os.fstat(fd).st_size)
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
    if libc.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")


def remove_seals(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)


def map_reopened_writable(fd: int) -> None:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        map_writable(writable)
    finally:
        os.close(writable)


WRITE_ROUTES: dict[str, Callable[[int], object]] = {
    "pwrite": lambda fd: os.pwrite(fd, b"x", 0),
    "ftruncate": lambda fd: os.ftruncate(fd, 4096),
    "truncate of a re-open": truncate_reopened,
    "write through a re-open": reopen_and_write,
    "writable mapping": map_writable,
    "writable mapping of a re-open": map_reopened_writable,
    "mprotect": protect_writable,
    "fallocate": punch_hole,
    "seals": remove_seals,
}


def test_a_client_cannot_change_a_segment_by_any_route(segment: int) -> None:
    before = os.pread(segment, 1 << 20, 0)

    closed = [name for name, route in WRITE_ROUTES.items() if fails(route, segment)]

    assert closed == list(WRITE_ROUTES)
    assert os.pread(segment, 1 << 20, 0) == before


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


def write_mem(pid: int, address: int) -> None:
    """Write one byte through /proc/PID/mem."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:  # noqa: PTH123 - unbuffered, at an address
        mem.seek(address)
        mem.write(b"x")


@pytest.mark.parametrize("route", [process_vm_writev, write_mem])
def test_no_process_can_write_through_another_ones_mapping(
    loaded: DaemonProcess, segment: int, store: Path, route: Callable[[int, int], None]
) -> None:
    before = os.pread(segment, 1 << 20, 0)
    with client_at("attached", store) as client:
        address = segment_address(client.pid)

        refused = fails(route, client.pid, address)

    assert refused
    assert os.pread(segment, 1 << 20, 0) == before
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
