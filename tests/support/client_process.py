"""A client in a process of its own that stops at one step of the protocol, to be frozen or killed there.

Run as a module: the step, then the store for the steps that need one. It writes one line when it is there, and ends
when its standard input does.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from expertd.config import fault_point, my_runtime_dir
from protocol import fdpass
from protocol import messages as m
from protocol.codec import encode
from protocol.control_client import ControlClient
from protocol.fault_points import arm
from runner.client import attach
from runner.config import RunnerConfig
from tests.support.daemon import with_fault
from tests.support.waiting import wait_readable

STEPS = ("connected", "welcomed", "attach_unread", "attached")


@contextmanager
def client_at(step: str, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a client and wait until it stands at that step; kill it at the end if it still lives."""
    with launched_client(step, store) as process:
        wait_for_step(process)
        yield process


@contextmanager
def launched_client(step: str, store: Path, *, fault: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Launch a client on its way to that step, maybe with a fault on it; kill it at the end if it lives."""
    command = [sys.executable, "-m", "tests.support.client_process", step, str(store)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, env=with_fault(fault)
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for_step(process: subprocess.Popen[bytes]) -> None:
    """Return when a client stands at its step."""
    assert process.stdout is not None
    wait_readable(process.stdout.fileno(), "a client at its step")
    assert process.stdout.readline() == b"here\n"


def main(step: str, store: Path) -> None:
    """Go to that step and stay there until standard input ends."""
    arm(fault_point())
    held = _step(step)(store)
    sys.stdout.write("here\n")
    sys.stdout.flush()
    sys.stdin.read()
    del held


def _step(step: str) -> Callable[[Path], object]:
    return {
        "connected": _connected,
        "welcomed": _welcomed,
        "attach_unread": _attach_unread,
        "attached": _attached,
    }[step]


def _connected(_store: Path) -> object:
    return fdpass.connect(my_runtime_dir().control_socket, 10.0)


def _welcomed(_store: Path) -> object:
    return ControlClient(my_runtime_dir())


def _attach_unread(store: Path) -> object:
    """Have the descriptors sent and leave them in the socket."""
    from expertd.store import read_manifest

    client = ControlClient(my_runtime_dir())
    fdpass.send_packet(client._sock, encode(m.Attach(read_manifest(store).digest)))
    wait_readable(client._sock.fileno(), "the descriptors")
    return client


def _attached(store: Path) -> object:
    """Attach and read every byte."""
    attached = attach(store, RunnerConfig(autostart=False))
    for key in attached.manifest.experts:
        sum(attached.expert_record(key)[::4096])
    return attached


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
