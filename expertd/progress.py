"""Progress bars on a terminal, with rate and time left. Elsewhere silence, so that logs stay readable; what takes hours
says a line a minute.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_EVERY_S = 60.0


class Conversion(Protocol):
    """How far a conversion is, in bytes of weights quantized and of files fetched."""

    @property
    def done_nbytes(self) -> int: ...  # noqa: D102  # the names say it
    @property
    def total_nbytes(self) -> int: ...  # noqa: D102
    @property
    def fetched_nbytes(self) -> int: ...  # noqa: D102
    @property
    def to_fetch_nbytes(self) -> int: ...  # noqa: D102


def say(line: str) -> None:
    """Write a line for the user, above the bars if there are any."""
    sys.stderr.write(f"expertd: {line}\n")


@contextmanager
def progress_bar(word: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to be called with the bytes done and the bytes there are."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    with _bars() as bars:
        task = bars.add_task(word, total=None)
        yield lambda done_nbytes, nbytes: bars.update(task, completed=done_nbytes, total=nbytes)


@contextmanager
def conversion_progress() -> Iterator[Callable[[Conversion], None]]:
    """Give a function to be told how far a conversion is."""
    if not sys.stderr.isatty():
        lines = ConversionLines()

        def write(conversion: Conversion) -> None:
            line = lines.line(conversion, now=time.monotonic())
            if line is not None:
                say(line)

        yield write
        return
    with _bars() as bars:
        fetching = bars.add_task("fetching", total=None, visible=False)
        quantizing = bars.add_task("quantizing", total=None)

        def show(conversion: Conversion) -> None:
            nbytes = conversion.to_fetch_nbytes
            bars.update(fetching, completed=conversion.fetched_nbytes, total=nbytes, visible=nbytes > 0)
            bars.update(quantizing, completed=conversion.done_nbytes, total=conversion.total_nbytes)

        yield show


class ConversionLines:
    """When a log gets a line, and what stands in it: the time left is what the rest takes at the pace so far."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None
        self._told_at = 0.0

    def line(self, conversion: Conversion, *, now: float) -> str | None:
        """Return a line, None if the last one was less than a minute ago."""
        if self._began is None:
            self._began, self._told_at = (now, conversion.done_nbytes), now
            return None
        if now - self._told_at < _LINE_EVERY_S:
            return None
        self._told_at = now
        done, total = conversion.done_nbytes, conversion.total_nbytes
        line = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB quantized"
        if conversion.to_fetch_nbytes:
            line += f", {conversion.fetched_nbytes / 1e9:.1f} of {conversion.to_fetch_nbytes / 1e9:.1f} GB fetched"
        began_at, began_nbytes = self._began
        if done > began_nbytes:
            left_s = (total - done) / (done - began_nbytes) * (now - began_at)
            line += f", about {max(1, round(left_s / 60))} min left"
        return line


@contextmanager
def _bars() -> Iterator["Progress"]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield bars
