"""`expertd top`: the status again and again, in a terminal of its own for that time. Blocks its caller.

It is one more session of the daemon's, and asks it one question a refresh.
"""

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from expertd.rates import Rates
from expertd.show import top_text
from protocol.control_client import ControlClient
from protocol.messages import GetStatus, Status

_QUITS = (b"q", b"Q", b"")  # the last: the terminal is gone


def can_show() -> bool:
    """Whether standard output is a terminal on which lines can be written over."""
    return Console().is_terminal and not Console().is_dumb_terminal


def show_top(client: ControlClient, interval_s: float) -> None:
    """Show the daemon until `q` or Ctrl-C, which leaves no trace; raise DaemonUnavailable when the daemon ends."""
    console = Console()
    before: Status | None = None
    with suppress(KeyboardInterrupt), _single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            status = client.ask(GetStatus(), Status)
            text = top_text(status, Rates(before, status), console.width, console.height)
            live.update(Text(text, no_wrap=True), refresh=True)
            before = status
            if _quits_within(interval_s):
                return


@contextmanager
def _single_keys() -> Iterator[None]:
    """Have keys come as they are pressed, unseen; Ctrl-C stays what it is."""
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    former = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, former)


def _quits_within(interval_s: float) -> bool:
    """Wait; return whether `q` was pressed. Any other key refreshes at once."""
    keys = [sys.stdin] if sys.stdin.isatty() else []
    if not select.select(keys, [], [], interval_s)[0]:
        return False
    try:
        return os.read(sys.stdin.fileno(), 1) in _QUITS
    except OSError:
        return True
