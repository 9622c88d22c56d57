"""A stand-in for systemd: a socket that takes sd_notify's datagrams and really keeps the descriptors that come along.

Run as a module it is the process between fork and exec: it puts kept descriptors where a service looks for them.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from protocol.fdpass import close_all
from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import EXPERTD, DaemonProcess
from tests.support.waiting import wait_until

_FDS_MAX = 4


class FakeManager:
    """Takes what its services say in a thread of its own, and hands what it keeps to the next service."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.said: list[str] = []
        self.kept: dict[str, int] = {}
        self._folder = folder
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(self.address)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def close(self) -> None:
        """Let go of everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.address)
        self._listener.join()
        self._socket.close()
        close_all(list(self.kept.values()))

    def has_heard(self, line: str) -> bool:
        """Whether a service said that line."""
        return any(line in text.splitlines() for text in self.said)

    @contextmanager
    def service(
        self, directory: RuntimeDir, *arguments: str, watchdog_s: float | None = None
    ) -> Iterator[DaemonProcess]:
        """Run a daemon as a service that has said it is ready; kill it at the end if it still runs."""
        self.said.clear()
        log_file = directory.path.parent / "daemon.log"
        environment = dict(os.environ) | {"EXPERTD_RUNTIME_DIR": str(directory.path), "NOTIFY_SOCKET": self.address}
        if watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        kept = [f"{name}={fd}" for name, fd in self.kept.items()]
        with ExitStack() as stack:
            log = stack.enter_context(log_file.open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, *kept, "--", *EXPERTD, "start", "--foreground", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=list(self.kept.values()),
                env=environment,
                cwd=Path(__file__).parents[2],
            )
            daemon = DaemonProcess(directory, process, log_file)
            stack.callback(lambda: daemon.kill() if daemon.is_alive() else None)
            wait_until(lambda: self.has_heard("READY=1") or not daemon.is_alive(), "the service to be ready")
            assert daemon.is_alive(), daemon.log
            yield daemon

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            self._take(data.decode(), fds)

    def _take(self, text: str, fds: list[int]) -> None:
        fields = dict(line.split("=", 1) for line in text.splitlines())
        name = fields.get("FDNAME", "")
        if fields.get("FDSTORE") == "1":
            close_all([self.kept[name]] if name in self.kept else [])
            (self.kept[name],) = fds
        elif fields.get("FDSTOREREMOVE") == "1" and name in self.kept:
            os.close(self.kept.pop(name))
        self.said.append(text)


def main(arguments: list[str]) -> None:
    """Become the service, with descriptors from 3 on."""
    end = arguments.index("--")
    named = [argument.rsplit("=", 1) for argument in arguments[:end]]
    # Out of the way first: where one is to be, another one may lie.
    high = [os.dup2(int(fd), 200 + index) for index, (_, fd) in enumerate(named)]
    close_all([int(fd) for _, fd in named])
    for index, fd in enumerate(high):
        os.dup2(fd, 3 + index)
        os.close(fd)
    environment = dict(os.environ)
    if named:
        environment |= {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(named)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in named),
        }
    command = arguments[end + 1 :]
    os.execve(command[0], command, environment)  # noqa: S606 - a list of arguments, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
