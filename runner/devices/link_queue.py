"""What a queue of the stand-in accelerator holds, in order, and which of it can run. Knows no threads and no time.

A queue holds work, marks and waits. A mark is one record of an event: the event stands for its latest mark, and a wait
for the mark that was the latest when it was submitted. Whoever runs the queues (link_threads, link_stepped) holds its
own lock around everything here.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from runner.devices.vector_clocks import Clock


@dataclass(slots=True, eq=False)
class Launch:
    """Something to compute; `number` is its own among all that the device is given."""

    run: Callable[[], None]
    number: int = 0

    @property
    def label(self) -> str:
        """Return what errors call it."""
        return f"launch (no. {self.number})"


@dataclass(slots=True, eq=False)
class Copy:
    """Bytes to copy, how long the link takes for them in the model, and what is kept until they were copied."""

    what: tuple[str, str, int]  # the source's and the target's names, and the offset in the target
    source: int
    target: int
    nbytes: int
    kept: tuple[Tensor, Tensor]
    duration_s: float = 0.0
    number: int = 0

    @property
    def label(self) -> str:
        """Return what errors call it."""
        source, target, offset = self.what
        return f"the copy of {source} into {target}[{offset}:{offset + self.nbytes}] (no. {self.number})"

    def run(self) -> None:
        """Copy the bytes, whatever the link would take."""
        ctypes.memmove(self.target, self.source, self.nbytes)


Work = Launch | Copy


@dataclass(slots=True, eq=False)
class Mark:
    """One record of an event, reached when the queue comes to it; whoever waits for it learns its clock."""

    event_name: str
    clock: Clock = field(default_factory=Clock)
    was_reached: bool = False
    # Of an executor in real time: where it stands in its queue; who is asked whether it is reached, if it is the copy
    # queue's; whether copies wait for it, if it is the compute queue's.
    place: int = 0
    asks: Callable[[], bool] | None = None
    is_held_for: bool = False

    @property
    def is_reached(self) -> bool:
        """Return whether all that stood before it has run."""
        if not self.was_reached and self.asks is not None:
            self.was_reached = self.asks()
        return self.was_reached


@dataclass(frozen=True, slots=True, eq=False)
class Wait:
    """What stands behind it runs once the mark is reached."""

    mark: Mark


Operation = Work | Mark | Wait


class OperationQueue:
    """Operations in the order of their submission."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._operations: deque[Operation] = deque()

    @property
    def is_empty(self) -> bool:
        """Return whether all that was submitted was taken."""
        return not self._operations

    @property
    def runnable(self) -> Operation | None:
        """Return the first operation if it can run; None if the queue is empty or waits."""
        if self.is_empty or self.awaited is not None:
            return None
        return self._operations[0]

    @property
    def awaited(self) -> Mark | None:
        """Return the mark without which the queue does not go on, if there is one."""
        first = self._operations[0] if self._operations else None
        return first.mark if isinstance(first, Wait) and not first.mark.is_reached else None

    def holds(self, operation: Operation) -> bool:
        """Return whether the operation was submitted here and not taken yet."""
        return operation in self._operations

    def append(self, operation: Operation) -> None:
        """Add an operation behind all others."""
        self._operations.append(operation)

    def take(self) -> Operation:
        """Take away and return the first operation, which can run; a mark is thereby reached."""
        operation = self._operations.popleft()
        if isinstance(operation, Mark):
            operation.was_reached = True
        return operation

    def __str__(self) -> str:
        if self.awaited is not None:
            return f"the {self.name} waits for {self.awaited.event_name}"
        return f"the {self.name} is empty" if self.is_empty else f"the {self.name} can go on"


class Failure:
    """The first error of submitted work: once there is one, no more work is run, and whoever asks is told."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._was_raised = False

    def run(self, work: Work, queue_name: str) -> None:
        """Run the work, unless something failed before; keep its error."""
        if self._error is not None:
            return
        try:
            work.run()
        except BaseException as error:  # noqa: BLE001 - it belongs to the host thread that submitted the work
            error.add_note(f"raised by {work.label} of the {queue_name}")
            self._error = error

    @property
    def has_happened(self) -> bool:
        """Return whether there is one."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error as it is, if there is one."""
        if self._error is not None:
            self._was_raised = True
            raise self._error

    def check_unraised(self) -> None:
        """Raise the error if nobody was told of it yet."""
        if not self._was_raised:
            self.check()


class Executor(Protocol):
    """Who runs the operations of a device's queues."""

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Return what is held around all calls below but `close`, and around the queues."""
        ...

    def progress(self) -> None:
        """Take the chance to run something, since a host thread has called."""
        ...

    def submit(self, queue: OperationQueue, operation: Operation, *, wakes: bool = True) -> None:
        """Add the operation to the queue; unless it `wakes`, a host thread is about to wait for it."""
        ...

    def reach(self, mark: Mark) -> None:
        """Block the calling host thread until the mark is reached; the lock may be free meanwhile."""
        ...

    def close(self) -> None:
        """Run all that was submitted, and end."""
        ...
