"""`expertd top` in a real terminal: it refreshes, fits, and ends without a trace on q, on Ctrl-C, with the daemon."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from protocol.runtime_dir import RuntimeDir
from tests.support.daemon import EXPERTD, DaemonProcess, run_expertd
from tests.support.waiting import WITHIN_S, wait_readable

LEAVE_SCREEN = "\x1b[?1049l"
END = b"-the end-"


@dataclass(slots=True)
class Terminal:
    """A terminal with a program in it."""

    fd: int
    other_end: int
    process: subprocess.Popen[bytes]
    shown: str = ""

    def wait_for(self, text: str) -> None:
        """Read until the program has written that, from now on; raise TimeoutError."""
        start = len(self.shown)
        while text not in self.shown[start:]:
            self._read()

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def read_to_end(self) -> str:
        """Wait for the program and return all that was shown."""
        pidfd = os.pidfd_open(self.process.pid)
        deadline = time.monotonic() + WITHIN_S
        while pidfd not in select.select([self.fd, pidfd], [], [], WITHIN_S)[0]:
            assert time.monotonic() < deadline, f"the end was expected; so far it shows {self.shown!r}"
            self._read()
        os.close(pidfd)
        self.process.wait()
        tty.setraw(self.other_end)  # what is written now comes as it is
        os.write(self.other_end, END)
        while not self.shown.endswith(END.decode()):
            self._read()
        return self.shown.removesuffix(END.decode())

    def _read(self) -> None:
        wait_readable(self.fd, f"the terminal; so far it shows {self.shown!r}")
        self.shown += os.read(self.fd, 1 << 16).decode(errors="replace")


@contextmanager
def top(columns: int = 120, *, term: str = "xterm") -> Iterator[Terminal]:
    """Run `expertd top` in a terminal of that width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, columns, 0, 0))
    # The first terminal that a session's leader opens is its own: Ctrl-C there is its interrupt.
    in_terminal = ("/bin/sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(slave))
    environment = ("env", "-u", "COLUMNS", "-u", "LINES", "-u", "NO_COLOR", f"TERM={term}")
    with subprocess.Popen(
        [*in_terminal, *environment, *EXPERTD, "top", "--interval", "0.1"], start_new_session=True
    ) as process:
        try:
            yield Terminal(master, slave, process)
        finally:
            process.kill()
            os.close(master)
            os.close(slave)


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_it_refreshes_until_it_is_told_to_end_and_gives_the_screen_back(loaded: DaemonProcess, key: bytes) -> None:
    with top() as terminal:
        terminal.wait_for(f"pid {loaded.pid}")
        terminal.wait_for(f"pid {loaded.pid}")
        terminal.press(key)
        shown = terminal.read_to_end()

    assert terminal.process.returncode == 0
    assert "read/s" in shown
    assert shown.rindex(LEAVE_SCREEN) > shown.rindex("pid")
    assert "Traceback" not in shown
    assert loaded.sessions() == 0


def test_the_end_of_the_daemon_is_one_line(loaded: DaemonProcess) -> None:
    with top() as terminal:
        terminal.wait_for(f"pid {loaded.pid}")
        loaded.terminate()
        shown = terminal.read_to_end()

    after = shown[shown.rindex(LEAVE_SCREEN) :]
    assert terminal.process.returncode == 0
    assert f"expertd: no more answers from the daemon, pid {loaded.pid}: expertd closed the connection" in after
    assert after.count("\n") == 1


@pytest.mark.usefixtures("loaded")
def test_it_fits_a_narrow_terminal() -> None:
    with top(columns=40) as terminal:
        terminal.wait_for("no sessions")
        terminal.press(b"q")
        shown = terminal.read_to_end()

    assert "available on this machine" not in shown
    assert "ready" in shown


@pytest.mark.usefixtures("loaded")
def test_a_terminal_that_cannot_write_over_lines_gets_one_look() -> None:
    with top(term="dumb") as terminal:
        shown = terminal.read_to_end()

    assert terminal.process.returncode == 0
    assert "no terminal, so this was one look" in shown


def test_without_a_terminal_it_is_one_look_on_standard_output(loaded: DaemonProcess) -> None:
    result = run_expertd("top")

    assert result.returncode == 0
    assert f"pid {loaded.pid}" in result.stdout
    assert result.stderr.startswith("expertd: no terminal")


def test_without_a_daemon_it_is_an_error(runtime: RuntimeDir) -> None:
    result = run_expertd("top")

    assert result.returncode == 1
    assert "start it with `expertd start STORE`" in result.stderr
    assert not runtime.path.exists()


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "often"])
def test_an_interval_is_a_positive_number(interval: str) -> None:
    assert run_expertd("top", "--interval", interval).returncode == 2
