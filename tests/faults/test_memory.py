"""Memory that cannot be had: a typed error before anything is visible, and the daemon as it was."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.store import read_manifest
from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Code, StoreState
from runner.client import attach
from runner.config import RunnerConfig
from runner.errors import RunnerError
from tests.support.client_process import launched_client
from tests.support.daemon import DaemonProcess, run_expertd, status_nbytes
from tests.support.frozen import settled_fds
from tests.support.segments import segments_of
from tests.support.stores import write_random_store
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
GROUPS = Path("/sys/fs/cgroup/memory")
# What a daemon leaves free for others is 256 MiB; what it has taken itself before it came here does not count.
NO_ROOM_NBYTES, SOME_ROOM_NBYTES = 257 << 20, 320 << 20


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A store of 79 MB."""
    write_random_store(tmp_path / "big", hidden=512, intermediate=1024, n_layers=8, n_experts=12)
    return tmp_path / "big"


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of the first version, to put processes in."""
    path = GROUPS / f"expertd-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("a memory control group of our own cannot be made here")
    yield path
    wait_until(lambda: not (path / "cgroup.procs").read_text(), "the group to be empty")
    path.rmdir()


def test_a_store_for_which_no_addresses_are_left_is_refused_and_a_smaller_one_is_not(
    daemon: DaemonProcess, big: Path, store: Path, manifest: Manifest
) -> None:
    digest = read_manifest(big).digest
    fds = settled_fds(daemon)
    resource.prlimit(daemon.pid, resource.RLIMIT_AS, (status_nbytes(daemon.pid, "VmSize") + (64 << 20), -1))

    status = daemon.load(big, digest)
    result = run_expertd("load", big)
    segments, fds_afterwards = segments_of(daemon.pid), settled_fds(daemon)
    smaller = daemon.load(store, manifest.digest)

    assert status.error is not None
    assert status.error.code is Code.OUT_OF_MEMORY
    assert "could not be mapped (Cannot allocate memory)" in status.error.detail
    assert result.returncode == 1
    assert "Cannot allocate memory" in result.stderr.splitlines()[-1]
    assert (segments, fds_afterwards) == ({}, fds)
    assert smaller.state is StoreState.READY
    assert "Traceback" not in daemon.log


def test_a_daemon_in_a_group_without_room_refuses_before_it_takes_anything(
    daemon: DaemonProcess, group: Path, big: Path, store: Path, manifest: Manifest
) -> None:
    (group / "memory.limit_in_bytes").write_text(str(NO_ROOM_NBYTES))
    (group / "cgroup.procs").write_text(str(daemon.pid))
    status = daemon.load(big, read_manifest(big).digest)
    segments = segments_of(daemon.pid)
    (group / "memory.limit_in_bytes").write_text(str(SOME_ROOM_NBYTES))
    smaller = daemon.load(store, manifest.digest)
    tiered = daemon.load(big, read_manifest(big).digest)
    daemon.kill()

    assert status.error is not None
    assert status.error.code is Code.OUT_OF_MEMORY
    assert "GB are available" in status.error.detail
    assert segments == {}
    assert (smaller.state, smaller.n_slots) == (StoreState.READY, 0)
    assert tiered.state is StoreState.READY
    assert 0 < tiered.n_slots < tiered.n_experts


def test_a_runner_without_addresses_says_so_and_its_session_ends(daemon: DaemonProcess, big: Path) -> None:
    """In a process of its own: its limit cannot be taken back."""
    daemon.load(big, read_manifest(big).digest)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            limit = status_nbytes(os.getpid(), "VmSize") + (32 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            status = 3 if says_out_of_memory(big) else 2
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    wait_until(lambda: daemon.sessions() == 0, "its session to end")

    assert os.waitstatus_to_exitcode(ended) == 3
    with attach(big, NO_AUTOSTART) as attached:
        key = ExpertKey(0, 0)
        assert len(attached.expert_record(key)) == attached.manifest.experts[key].nbytes


def says_out_of_memory(store: Path) -> bool:
    try:
        attach(store, NO_AUTOSTART)
    except RunnerError as error:
        return "could not be mapped (Cannot allocate memory)" in str(error)
    return False


@contextmanager
def limited_fds(pid: int, n_fds: int) -> Iterator[None]:
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE, (n_fds, n_fds))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_daemon_without_descriptors_for_a_store_says_so_and_keeps_none(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    fds = settled_fds(daemon)
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (daemon.n_fds() + 3, limits[1]))
    failed = daemon.load(store, manifest.digest)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
    fds_afterwards = settled_fds(daemon)
    again = daemon.load(store, manifest.digest)

    assert failed.error is not None
    assert "Too many open files" in failed.error.detail
    assert fds_afterwards == fds
    assert again.state is StoreState.READY


def test_a_runner_without_descriptors_says_so_and_its_session_ends(loaded: DaemonProcess, store: Path) -> None:
    base = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (base + 2, limits[1]))
    try:
        with pytest.raises(RunnerError, match=r"too many open files|Too many open files"):
            attach(store, NO_AUTOSTART)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    wait_until(lambda: loaded.sessions() == 0, "its session to end")
    with launched_client("attached", store) as client:
        wait_until(lambda: loaded.sessions() == 1, "another one to be served")
        client.kill()
