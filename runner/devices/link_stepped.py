"""The stand-in accelerator's queues without threads: one operation at a time, in an order drawn from a seed.

Whenever a host thread calls the device, some of what can run is run, from either queue: nothing, everything, or part.
One seed is one order, every time, as long as one host thread calls; many seeds are many orders, among them those in
which the host is far ahead, or one queue is. No call blocks another one but for as long as it runs operations itself.
"""

import random
import threading
from collections.abc import Sequence

from runner.devices.errors import Deadlock
from runner.devices.link_queue import Copy, Failure, Launch, Mark, Operation, OperationQueue


class RandomScheduler:
    """Draws what runs next. How eager it is to run anything, and which queue it prefers, is drawn first."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - an order to test, not a secret
        self._eagerness = self._random.choice((0.1, 0.5, 0.9))
        self._preference = self._random.choice((0.1, 0.5, 0.9))

    def goes_on(self) -> bool:
        """Return whether to run an operation that nobody waits for."""
        return self._random.random() < self._eagerness

    def choose(self, queues: Sequence[OperationQueue]) -> OperationQueue:
        """Return the queue whose first operation runs next, out of those that can run."""
        return queues[0] if self._random.random() < self._preference else queues[-1]


class SteppedExecutor:
    """Runs the queues' operations one by one in whichever host thread calls, under the lock."""

    def __init__(self, queues: Sequence[OperationQueue], failure: Failure, scheduler: RandomScheduler) -> None:
        self.lock = threading.RLock()
        self._queues = queues
        self._failure = failure
        self._scheduler = scheduler

    def progress(self) -> None:
        """Run as much as the scheduler wants of what can run."""
        while self._runnable() and self._scheduler.goes_on():
            self._step()

    def submit(self, queue: OperationQueue, operation: Operation, *, wakes: bool = True) -> None:  # noqa: ARG002
        """Add the operation to the queue."""
        queue.append(operation)

    def reach(self, mark: Mark) -> None:
        """Run operations until the mark is reached; raise Deadlock if nothing can run before it is."""
        while not mark.is_reached:
            self._step()

    def close(self) -> None:
        """Run all that was submitted; raise Deadlock if something of it cannot run."""
        with self.lock:
            while not all(queue.is_empty for queue in self._queues):
                self._step()

    def _runnable(self) -> list[OperationQueue]:
        return [queue for queue in self._queues if queue.runnable is not None]

    def _step(self) -> None:
        """Run one operation; raise Deadlock if there is none that can run."""
        queues = self._runnable()
        if not queues:
            raise Deadlock("nothing can run: " + "; ".join(str(queue) for queue in self._queues))
        queue = self._scheduler.choose(queues)
        operation = queue.take()
        if isinstance(operation, Launch | Copy):
            self._failure.run(operation, queue.name)
