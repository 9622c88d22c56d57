"""What another user of the machine, and a careless one, finds: closed doors."""

import ctypes
import os
import socket
from functools import partial
from pathlib import Path

import pytest

from protocol.control_client import ControlClient
from protocol.runtime_dir import RuntimeDir
from runner.client import attach
from runner.config import RunnerConfig
from runner.errors import StoreUnavailable
from tests.support.as_user import run_as_nobody
from tests.support.client_process import client_at
from tests.support.daemon import DaemonProcess
from tests.support.foreign_memory import fails, process_vm_readv, segment_address

NO_AUTOSTART = RunnerConfig(autostart=False)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("name", ["control.sock", "request.sock"])
def test_another_user_cannot_connect(loaded: DaemonProcess, name: str) -> None:
    kind = socket.SOCK_SEQPACKET if name == "control.sock" else socket.SOCK_STREAM
    path = str(loaded.directory.path / name)

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.connect(path)

    as_myself, as_nobody = connect(), run_as_nobody(connect)  # type: ignore[func-returns-value]

    assert as_myself is None
    assert as_nobody == "PermissionError"


@pytest.mark.usefixtures("as_root")
def test_another_user_is_told_in_one_line(loaded: DaemonProcess) -> None:
    outcome = run_as_nobody(lambda: ControlClient(loaded.directory))

    assert outcome == "RuntimeDirError"


def list_fds(pid: int) -> None:
    """See which descriptors another process holds."""
    list(Path(f"/proc/{pid}/fd").iterdir())


def list_mappings(pid: int) -> None:
    """See which files another process maps."""
    list(Path(f"/proc/{pid}/map_files").iterdir())


def open_fd(pid: int) -> None:
    """Open what another process has open."""
    os.close(os.open(f"/proc/{pid}/fd/1", os.O_WRONLY))


def open_mem(pid: int) -> None:
    """Open the memory of another process."""
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))


def pidfd_getfd(pid: int) -> None:
    """Take a descriptor out of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    taken = libc.syscall(438, pidfd, 1, 0)
    error = ctypes.get_errno()
    os.close(pidfd)
    if taken < 0:
        raise OSError(error, "pidfd_getfd")
    os.close(taken)


READ_ROUTES = (list_fds, list_mappings, open_fd, open_mem, pidfd_getfd)


@pytest.mark.usefixtures("as_root")
def test_another_user_cannot_read_the_memory_of_daemon_or_client(loaded: DaemonProcess, store: Path) -> None:
    with client_at("attached", store) as client:
        tries = [partial(route, pid) for pid in (loaded.pid, client.pid) for route in READ_ROUTES]

        as_root = [fails(attempt) for attempt in tries]
        as_nobody = [run_as_nobody(attempt) for attempt in tries]

    assert not any(as_root)
    assert as_nobody == ["PermissionError"] * len(tries)


@pytest.mark.usefixtures("as_root")
def test_another_user_cannot_read_from_one_process_to_another(loaded: DaemonProcess, store: Path) -> None:
    with client_at("attached", store) as client:
        address = segment_address(client.pid)

        as_root = process_vm_readv(client.pid, address)
        as_nobody = run_as_nobody(partial(process_vm_readv, client.pid, address))

    assert len(as_root) == 1
    assert as_nobody == "PermissionError"
    assert loaded.is_alive()


def test_a_process_of_the_same_user_cannot_look_into_the_daemon(loaded: DaemonProcess) -> None:
    """The daemon is not dumpable: only root may."""
    if os.geteuid() == 0:
        pytest.skip("root may look into every process")

    with pytest.raises(PermissionError):
        list(Path(f"/proc/{loaded.pid}/fd").iterdir())


def test_the_runtime_directory_is_closed_to_everybody_else(loaded: DaemonProcess) -> None:
    found = loaded.directory.path.stat()

    assert found.st_mode & 0o777 == 0o700
    assert found.st_uid == os.geteuid()


@pytest.mark.usefixtures("as_root")
def test_a_directory_of_another_user_is_refused(runtime: RuntimeDir, store: Path) -> None:
    runtime.path.mkdir(mode=0o700)
    os.chown(runtime.path, 65534, 65534)

    with pytest.raises(StoreUnavailable, match="belongs to user 65534"):
        attach(store, NO_AUTOSTART)


def test_a_directory_open_to_others_is_refused_by_a_client(runtime: RuntimeDir, store: Path) -> None:
    runtime.path.mkdir()
    runtime.path.chmod(0o755)

    with pytest.raises(StoreUnavailable, match="mode 0755, 0700 was expected"):
        attach(store, NO_AUTOSTART)


def test_a_directory_that_is_a_link_is_refused_by_a_client(runtime: RuntimeDir, store: Path, tmp_path: Path) -> None:
    runtime.path.symlink_to(tmp_path)

    with pytest.raises(StoreUnavailable, match="a link or file is there"):
        attach(store, NO_AUTOSTART)
