"""A real daemon in a process of its own, with a runtime directory of its own, and what can be measured of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.errors import ProtocolError
from protocol.messages import Status, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from tests.support.waiting import wait_for_exit, wait_readable, wait_until

EXPERTD = (sys.executable, "-m", "expertd")


@dataclass(frozen=True, slots=True)
class DaemonProcess:
    """A daemon that runs, or ran."""

    directory: RuntimeDir
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def client(self, timeout_s: float = 10.0) -> ControlClient:
        return ControlClient(self.directory, timeout_s=timeout_s)

    def status(self) -> Status:
        with self.client() as client:
            return client.ask(m.GetStatus(), Status)

    def sessions(self) -> int:
        """Return how many sessions there are beside the one that asks."""
        return len(self.status().sessions) - 1

    def store(self, digest: str) -> StoreStatus:
        """Return what the daemon says of a store."""
        return next(store for store in self.status().stores if store.digest == digest)

    def load(self, path: Path, digest: str) -> StoreStatus:
        """Have a store loaded and wait for the outcome."""
        with self.client() as client:
            client.ask(m.Load(str(path), digest), StoreStatus)
        wait_until(lambda: self.store(digest).state is not StoreState.LOADING, "the store to be loaded")
        return self.store(digest)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def fds(self) -> list[Path]:
        """Return the descriptors the daemon holds; skip the test where they are hidden."""
        try:
            return list(Path(f"/proc/{self.pid}/fd").iterdir())
        except PermissionError:
            pytest.skip("only root sees the descriptors of a process that forbids inspection")

    def n_fds(self) -> int:
        """Return how many descriptors the daemon holds without the one this takes; skip where they are hidden."""
        with self.client() as client:
            # Its answer comes after every connection that ended before has been dropped.
            client.ask(m.GetStatus(), Status)
            return len(self.fds()) - 1

    def private_nbytes(self) -> int:
        """Return the memory that is this process's alone: not shared with a file or a segment."""
        return status_nbytes(self.pid, "RssAnon")

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def kill(self) -> None:
        """SIGKILL: no goodbye, stale sockets."""
        self.process.kill()
        self.process.wait(timeout=20)


@contextmanager
def running_daemon(directory: RuntimeDir, *arguments: str, fault: str | None = None) -> Iterator[DaemonProcess]:
    """Run a daemon in the foreground that is ready; kill it at the end if it still runs."""
    with launched_daemon(directory, *arguments, fault=fault) as (daemon, reader):
        wait_readable(reader, "the daemon to be ready")
        assert os.read(reader, 1) == b"R", daemon.log
        yield daemon


@contextmanager
def launched_daemon(
    directory: RuntimeDir, *arguments: str, fault: str | None = None
) -> Iterator[tuple[DaemonProcess, int]]:
    """Launch a daemon in the foreground, which may not be ready, and give the descriptor where it will say so.

    `fault` is an order for one of the product's fault points.
    """
    directory.path.parent.mkdir(exist_ok=True)
    log_file = directory.path.parent / "daemon.log"
    reader, writer = os.pipe()
    try:
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [*EXPERTD, "start", "--foreground", "--ready-fd", str(writer), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                env=with_fault(fault) | {"EXPERTD_RUNTIME_DIR": str(directory.path)},
            )
        os.close(writer)
        daemon = DaemonProcess(directory, process, log_file)
        try:
            yield daemon, reader
        finally:
            if daemon.is_alive():
                daemon.kill()
    finally:
        os.close(reader)


def with_fault(fault: str | None) -> dict[str, str]:
    """Return this process's environment with that order for a fault point, with none for None."""
    environment = {name: value for name, value in os.environ.items() if name != "EXPERTD_FAULT_POINT"}
    return environment if fault is None else environment | {"EXPERTD_FAULT_POINT": fault}


def run_expertd(*arguments: str | Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the command line and return what it said."""
    return subprocess.run(
        [*EXPERTD, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def stop_background_daemon(directory: RuntimeDir) -> None:
    """End the daemon that `expertd start` left in the background, if there is one."""
    pid = background_pid(directory)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)


def background_pid(directory: RuntimeDir) -> int | None:
    """Return the pid of the daemon that serves there, None if none does."""
    try:
        with ControlClient(directory) as client:
            return client.welcome.pid
    except ProtocolError:
        return None


def status_nbytes(pid: int, field: str) -> int:
    """Return a field of /proc/PID/status, which is open to everybody, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no {field}")
