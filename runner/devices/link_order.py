"""Whether events order what a device is told to do: checked in strict mode, not looked at otherwise.

StrictOrder translates what host threads call into steps of vector clocks. It is told at the call, before anything runs:
what a queue's work is ordered after is settled when it is submitted, and the error comes up where the mistake is.
All methods but `poison` are called under the device's lock, by the host thread that called the device.
"""

import threading
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from runner.devices.errors import UnrecordedEvent
from runner.devices.vector_clocks import Access, AccessHistory, Clock, VectorClocks

POISON = 0xFF


class Order(Protocol):
    """What is done about the order of accesses."""

    @property
    def is_strict(self) -> bool:
        """Return whether anything is done."""
        ...

    def submit(
        self, queue: str, label: str, *, reads: Sequence[AccessHistory], writes: Sequence[AccessHistory]
    ) -> None:
        """Note work that a queue is given; raise UnorderedAccess."""
        ...

    def record(self, queue: str) -> Clock:
        """Return the clock of an event that is recorded on the queue now."""
        ...

    def wait(self, queue: str, clock: Clock) -> None:
        """Note that the queue waits for an event with that clock."""
        ...

    def unrecorded(self, event_name: str) -> None:
        """Note that someone waits for an event that was never recorded; raise UnrecordedEvent."""
        ...

    def learn(self, clock: Clock) -> None:
        """Note that the calling thread knows that all this has happened."""
        ...

    def publish(self) -> Clock:
        """Return what the calling thread knows and did until now."""
        ...

    def begin(self, history: AccessHistory, label: str, *, writes: bool) -> Access:
        """Return an access by the calling thread, from now until `end`; raise UnorderedAccess."""
        ...

    def end(self, history: AccessHistory, access: Access) -> None:
        """Note that the access is over."""
        ...

    def poison(self, tensor: Tensor) -> None:
        """Make memory unusable that nobody may read before it is written."""
        ...


class StrictOrder:
    """Every access must be ordered after the earlier ones that conflict with it."""

    is_strict = True

    def __init__(self) -> None:
        self._clocks = VectorClocks()
        # By what a thread keeps for itself: the system gives the numbers of ended threads to new ones.
        self._thread = threading.local()
        self._n_threads = 0

    def submit(
        self, queue: str, label: str, *, reads: Sequence[AccessHistory], writes: Sequence[AccessHistory]
    ) -> None:
        """Note work that a queue is given; raise UnorderedAccess."""
        clock = self._call(queue)
        for history in reads:
            history.add(Access(queue, clock.steps[queue], label, writes=False), clock)
        for history in writes:
            history.add(Access(queue, clock.steps[queue], label, writes=True), clock)

    def record(self, queue: str) -> Clock:
        """Return the clock of an event that is recorded on the queue now."""
        return self._call(queue)

    def wait(self, queue: str, clock: Clock) -> None:
        """Note that the queue waits for an event with that clock."""
        self._clocks.learn(queue, clock)

    def unrecorded(self, event_name: str) -> None:
        """Raise UnrecordedEvent."""
        raise UnrecordedEvent(f"{event_name} is waited for and was never recorded")

    def learn(self, clock: Clock) -> None:
        """Note that the calling thread knows that all this has happened."""
        self._clocks.learn(self._host(), clock)

    def publish(self) -> Clock:
        """Return what the calling thread knows and did until now."""
        return self._clocks.advance(self._host())

    def begin(self, history: AccessHistory, label: str, *, writes: bool) -> Access:
        """Return an access by the calling thread, from now until `end`; raise UnorderedAccess."""
        host = self._host()
        clock = self._clocks.advance(host)
        access = Access(host, clock.steps[host], label, writes)
        history.begin(access, clock)
        return access

    def end(self, history: AccessHistory, access: Access) -> None:
        """Note that the access is over."""
        history.end(access, self._clocks.advance(access.component).steps[access.component])

    def poison(self, tensor: Tensor) -> None:
        """Fill the memory with 0xFF."""
        tensor.fill_(POISON)

    def _call(self, queue: str) -> Clock:
        """Return the clock of what the calling thread gives the queue: all that the thread knows is before it."""
        self._clocks.learn(queue, self._clocks.advance(self._host()))
        return self._clocks.advance(queue)

    def _host(self) -> str:
        """Return the calling thread's component."""
        name = getattr(self._thread, "name", None)
        if name is None:
            self._n_threads += 1
            name = self._thread.name = f"host thread {self._n_threads} ({threading.current_thread().name})"
        return str(name)


class NoOrder:
    """Nothing is checked."""

    is_strict = False
    _NOTHING = Clock()
    _ACCESS = Access("host", 0, "access", writes=False)

    def submit(
        self, queue: str, label: str, *, reads: Sequence[AccessHistory], writes: Sequence[AccessHistory]
    ) -> None:
        """Do nothing."""

    def record(self, queue: str) -> Clock:  # noqa: ARG002 - Order's
        """Return that nothing is known."""
        return self._NOTHING

    def wait(self, queue: str, clock: Clock) -> None:
        """Do nothing."""

    def unrecorded(self, event_name: str) -> None:
        """Do nothing: the event counts as having happened."""

    def learn(self, clock: Clock) -> None:
        """Do nothing."""

    def publish(self) -> Clock:
        """Return that nothing is known."""
        return self._NOTHING

    def begin(self, history: AccessHistory, label: str, *, writes: bool) -> Access:  # noqa: ARG002 - Order's
        """Return an access that means nothing."""
        return self._ACCESS

    def end(self, history: AccessHistory, access: Access) -> None:
        """Do nothing."""

    def poison(self, tensor: Tensor) -> None:
        """Do nothing."""
