"""A real `runner generate` whose text is taken bit by bit: it goes no further than it is read, however fast it is."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 120.0
# About as often as a runner looks after its session.
_READ_EVERY_S = 0.03


@dataclass
class PacedRunner:
    """A runner, and what was read of its text."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    text: bytearray = field(default_factory=bytearray)
    read_at: float = 0.0

    def go_on(self) -> bool:
        """Read a token or two more of the text, now and then; return whether the runner still runs."""
        now = time.monotonic()
        if now - self.read_at > _READ_EVERY_S and select.select([self.sock], [], [], 0.0)[0]:
            self.read_at = now
            self.text += self.sock.recv(4)
        return self.process.poll() is None

    def begin(self) -> None:
        """Return when there is text: the runner is in the middle of it now."""
        self.sock.settimeout(TIMEOUT_S)
        self.text += self.sock.recv(1)

    def finish(self) -> bytes:
        """Return the whole text; fail if the runner does."""
        said = self._read_all()
        assert self.process.wait(TIMEOUT_S) == 0, said
        return bytes(self.text)

    def fail(self) -> str:
        """Return what the runner says went wrong."""
        said = self._read_all()
        assert self.process.wait(TIMEOUT_S) == 1, said
        return said

    def complaint(self) -> str:
        """Return what a runner that has ended said went wrong."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def _read_all(self) -> str:
        self.sock.settimeout(TIMEOUT_S)
        while piece := self.sock.recv(1 << 16):
            self.text += piece
        return self.complaint()


@contextmanager
def paced_runner(store: Path, *options: str, autostart: bool = True) -> Iterator[PacedRunner]:
    """Run a runner that continues a text; kill it at the end if it still lives."""
    command = [sys.executable, "-m", "runner", "generate", "--store", str(store), "--raw", "--prompt", "Once", *options]
    environment = dict(os.environ) | ({} if autostart else {"EXPERTD_AUTOSTART": "0"})
    reader, writer = socket.socketpair()
    with reader:
        with writer:
            # So little that a few tokens fill it.
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=writer.fileno(), stderr=subprocess.PIPE, env=environment
            )
        with process:
            try:
                yield PacedRunner(process, reader)
            finally:
                process.kill()
