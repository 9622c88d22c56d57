"""The stand-in's copy queue in real time: what it is given goes on to timed copies, which run by themselves.

Owns the copies and what they read and write, until they have run. All but `wait` is called under the executor's lock;
`wait` blocks, and is called without it.
"""

from collections import deque
from functools import partial

from quant.timed_copies import Copies
from runner.devices.link_queue import Copy, Mark, Operation, Wait


class LinkCopies:
    """Copies, marks between them, and waits for the compute queue's marks."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._place = 0  # of what was added last
        self._kept: deque[tuple[int, Copy]] = deque()

    def submit(self, operation: Operation) -> None:
        """Add the operation behind all others."""
        if isinstance(operation, Mark):
            operation.place = self._place
            operation.asks = partial(self._copies.are_done, self._place)
        elif isinstance(operation, Copy):
            self._forget_done()
            self._place = self._copies.add(operation.target, operation.source, operation.nbytes, operation.duration_s)
            self._kept.append((self._place, operation))
        elif isinstance(operation, Wait) and operation.mark.asks is None:  # those of this queue are in order anyway
            operation.mark.is_held_for = True
            self._place = self._copies.hold(operation.mark.place)

    def pass_mark(self, mark: Mark) -> None:
        """Note that the compute queue has come to a mark."""
        if mark.is_held_for:
            self._copies.release(mark.place)

    def wait(self, mark: Mark) -> None:
        """Block until the copies' mark is reached."""
        self._copies.wait(mark.place)

    def skip(self) -> None:
        """Copy nothing from now on."""
        self._copies.skip()

    def close(self) -> None:
        """Do all that was submitted, and end."""
        self._copies.close()

    def _forget_done(self) -> None:
        while self._kept and self._copies.are_done(self._kept[0][0]):
            self._kept.popleft()
