"""The runtime directory: removed, replaced, open to others, somebody else's; and who may clear away what lies there."""

import os
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol.handles import ExpertKey
from protocol.manifest import Manifest
from protocol.runtime_dir import RuntimeDir
from runner.client import attach
from runner.config import RunnerConfig
from runner.errors import StoreUnavailable
from tests.support.as_user import NOBODY
from tests.support.daemon import DaemonProcess, run_expertd, running_daemon
from tests.support.segments import is_held, segments_of
from tests.support.visit import NOTHING, visit
from tests.support.waiting import wait_until

NO_AUTOSTART = RunnerConfig(autostart=False)
LOST = "expertd: the runtime directory was removed or replaced, and no client finds it any more"


def test_a_daemon_whose_directory_is_removed_ends_and_its_runners_read_on(loaded: DaemonProcess, store: Path) -> None:
    with attach(store, NO_AUTOSTART) as attached:
        record = bytes(attached.expert_record(ExpertKey(0, 1)))
        shutil.rmtree(loaded.directory.path)

        code = loaded.process.wait(timeout=20)

        assert bytes(attached.expert_record(ExpertKey(0, 1))) == record
    assert code == 1
    assert loaded.log.splitlines()[-1] == LOST


@pytest.mark.parametrize("name", ["control.sock", "request.sock", "lock"])
def test_a_daemon_that_lost_one_file_of_its_place_ends(loaded: DaemonProcess, name: str) -> None:
    (loaded.directory.path / name).unlink()

    code = loaded.process.wait(timeout=20)

    assert code == 1
    assert loaded.log.splitlines()[-1] == LOST
    with running_daemon(loaded.directory) as successor:
        assert successor.sessions() == 0


def test_a_daemon_that_lost_its_place_leaves_its_successors_sockets_alone(
    loaded: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """It is frozen while its directory is replaced, and ends when another one serves there."""
    loaded.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(loaded.directory.path)
    with running_daemon(loaded.directory) as successor:
        loaded.process.send_signal(signal.SIGCONT)
        code = loaded.process.wait(timeout=20)

        told = visit(successor.directory, store, manifest.digest)

    assert code == 1
    assert told == NOTHING


def test_a_socket_of_somebody_else_in_the_way_is_replaced(runtime: RuntimeDir, store: Path, manifest: Manifest) -> None:
    """Only the holder of the lock unlinks; what is there without a holder is stale, whoever made it."""
    runtime.path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(runtime.control_socket))
    runtime.request_socket.write_text("no socket at all")

    with running_daemon(runtime):
        told = visit(runtime, store, manifest.digest)

    assert told == NOTHING


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.chmod(0o755), "mode 0755, 0700 was expected"),
        (lambda path: path.chmod(0o710), "mode 0710, 0700 was expected"),
        (lambda path: (path.rmdir(), path.symlink_to(path.parent)), "a directory was expected, a link"),
        (lambda path: (path.rmdir(), path.write_text("")), "a directory was expected"),
        (lambda path: (path / "lock").symlink_to(path / "nowhere"), "lock: cannot be opened"),
        (lambda path: (path / "control.sock").mkdir(), "control.sock: Is a directory"),
    ],
    ids=["0755", "0710", "link", "file", "linked lock", "directory in the way"],
)
def test_a_daemon_does_not_start_where_it_would_not_be_safe(
    runtime: RuntimeDir, store: Path, spoil: "object", message: str
) -> None:
    runtime.path.mkdir(mode=0o700)
    spoil(runtime.path)  # type: ignore[operator]

    in_foreground = run_expertd("start", "--foreground", store)
    in_background = run_expertd("start", store)

    assert in_foreground.returncode == in_background.returncode == 1
    assert message in in_foreground.stderr.splitlines()[-1]
    assert message in in_background.stderr.splitlines()[-1]
    assert "Traceback" not in in_foreground.stderr + in_background.stderr


@pytest.mark.usefixtures("as_root")
def test_a_daemon_does_not_start_in_a_directory_of_another_user(runtime: RuntimeDir, store: Path) -> None:
    runtime.path.mkdir(mode=0o700)
    os.chown(runtime.path, NOBODY, NOBODY)

    result = run_expertd("start", "--foreground", store)

    assert result.returncode == 1
    assert f"belongs to user {NOBODY}, user 0 was expected" in result.stderr.splitlines()[-1]


def test_a_runner_finds_a_directory_that_was_opened_to_others(loaded: DaemonProcess, store: Path) -> None:
    loaded.directory.path.chmod(0o777)

    with pytest.raises(StoreUnavailable, match="mode 0777, 0700 was expected"):
        attach(store, RunnerConfig())

    loaded.directory.path.chmod(0o700)
    with attach(store, NO_AUTOSTART) as attached:
        assert attached.manifest.experts


def test_a_runner_does_not_wait_for_a_frozen_daemon_for_ever(loaded: DaemonProcess, store: Path) -> None:
    """Not even where it may start one: the frozen one holds the lock."""
    loaded.process.send_signal(signal.SIGSTOP)

    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(run_expertd, "start", store)
        with pytest.raises(StoreUnavailable, match=rf"did not answer in time; .* `kill -9 {loaded.pid}` ends it"):
            attach(store, RunnerConfig())
        result = starting.result()

    loaded.process.send_signal(signal.SIGCONT)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert f"`kill -9 {loaded.pid}` ends it" in result.stderr
    wait_until(lambda: loaded.sessions() == 0, "the sessions of those who gave up to end")
    with attach(store, NO_AUTOSTART):
        assert is_held(loaded, segments_of(loaded.pid))
