"""SIGINT and SIGTERM as a question that is asked between two steps, so that no cleaning up is ever cut in two.

Handlers can be set in the main thread alone; elsewhere signals keep their meaning and nothing is asked.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from expertd.convert.errors import Terminated


class Interruption:
    """Whether a signal came."""

    def __init__(self) -> None:
        self._signal_number: int | None = None

    @property
    def is_asked(self) -> bool:
        """Whether one came; for threads that may not end the work themselves."""
        return self._signal_number is not None

    def check(self) -> None:
        """Raise KeyboardInterrupt after SIGINT, Terminated after SIGTERM."""
        if self._signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal_number is not None:
            raise Terminated("ended by SIGTERM before the store was complete")

    def note(self, signal_number: int, frame: FrameType | None) -> None:
        """Take a signal down; a second one of the same kind finds the default handler and does not wait."""
        del frame
        self._signal_number = signal_number
        signal.signal(signal_number, signal.default_int_handler if signal_number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Yield what says whether a signal came; signals mean that for the length of the block."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # A signal that is ignored, as in a shell's background job, stays so.
    taken = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, asked.note) for number in taken]
    try:
        yield asked
    finally:
        for number, handler in zip(taken, before, strict=True):
            signal.signal(number, handler)
