"""The lock of the daemon, and the word it gives who waits for it."""

import os
import resource
from pathlib import Path

import pytest

from expertd.errors import AlreadyRunning, StartFailed
from expertd.lifecycle import BUSY, READY, DaemonLock, MemoryMeter, ReadyPipe, available_nbytes
from protocol.errors import RuntimeDirError
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import status_nbytes


def test_there_is_one_lock_holder_at_a_time(runtime: RuntimeDir) -> None:
    with DaemonLock(runtime), pytest.raises(AlreadyRunning, match="another expertd"):
        DaemonLock(runtime)

    with DaemonLock(runtime):
        pass


def test_only_the_holder_clears_away_stale_sockets(runtime: RuntimeDir) -> None:
    runtime.path.mkdir(mode=0o700)
    runtime.control_socket.touch()
    runtime.request_socket.touch()

    with DaemonLock(runtime):
        cleared = not runtime.control_socket.exists() and not runtime.request_socket.exists()
        runtime.control_socket.touch()
        with pytest.raises(AlreadyRunning):
            DaemonLock(runtime)
        kept = runtime.control_socket.exists()

    assert cleared
    assert kept
    assert not runtime.control_socket.exists()


def test_a_lock_that_is_a_link_is_not_followed(runtime: RuntimeDir, tmp_path: Path) -> None:
    runtime.path.mkdir(mode=0o700)
    (tmp_path / "victim").write_text("precious")
    runtime.lock.symlink_to(tmp_path / "victim")

    with pytest.raises(StartFailed, match="lock: cannot be opened"):
        DaemonLock(runtime)

    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o777])
def test_a_directory_open_to_others_is_refused(runtime: RuntimeDir, mode: int) -> None:
    runtime.path.mkdir()
    runtime.path.chmod(mode)

    with pytest.raises(RuntimeDirError, match="0700 was expected"):
        DaemonLock(runtime)


def test_a_directory_that_is_a_link_is_refused(runtime: RuntimeDir, tmp_path: Path) -> None:
    runtime.path.symlink_to(tmp_path)

    with pytest.raises(RuntimeDirError, match="a link or file is there"):
        DaemonLock(runtime)

    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_one_byte_and_the_end() -> None:
    for word in (READY, BUSY):
        reader, writer = os.pipe()

        ReadyPipe(writer).tell(word)

        assert os.read(reader, 10) == word
        assert os.read(reader, 10) == b""
        os.close(reader)


def test_nobody_listening_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    ReadyPipe(writer).tell(READY)
    ReadyPipe(None).tell(READY)


def test_the_figures_are_of_this_process_and_machine() -> None:
    meter = MemoryMeter()

    figures = meter.figures()
    meter.close()

    assert figures.private_nbytes == pytest.approx(status_nbytes(os.getpid(), "RssAnon"), rel=0.2)
    assert figures.available_nbytes == pytest.approx(available_nbytes(), rel=0.2)


def test_the_figures_need_no_further_descriptor() -> None:
    meter = MemoryMeter()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        figures = meter.figures()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        meter.close()

    assert figures.private_nbytes > 0
