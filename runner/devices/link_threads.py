"""The stand-in accelerator's queues in real time: copies run by themselves, computations in a thread or where awaited.

A host thread that waits for what was computed computes it itself, if the queue's own thread has not begun: on the CPU
that is what an accelerator's time is worth, and waking the other thread would add what no accelerator takes.

Owns the compute queue's thread. It, or a host thread in its place, blocks on copies that the queue waits for; a host
thread blocks until a mark is reached. Whoever computes or waits holds neither the lock nor the interpreter's.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runner.devices.link_copies import LinkCopies
from runner.devices.link_queue import Failure, Launch, Mark, Operation, OperationQueue, Wait


class ThreadedExecutor:
    """Runs both queues. `_serve` is the compute queue's thread; host threads call the rest."""

    def __init__(
        self, copies: LinkCopies, copy_queue: OperationQueue, compute: OperationQueue, failure: Failure
    ) -> None:
        """Start the thread. The copies, which this closes, get all that the copy queue is given."""
        self.lock = threading.Lock()
        self._copies, self._copy_queue, self._compute = copies, copy_queue, compute
        self._failure = failure
        self._n_marks = 0  # of the compute queue
        self._is_busy = False  # whether someone computes, or waits for copies before
        self._is_called = False  # whether the thread is to run the compute queue until it is empty
        self._left_to: int | None = None  # the host thread that is going to run it instead
        self._is_closing = False
        self._called = threading.Condition(self.lock)
        self._reached = threading.Condition(self.lock)
        # A daemon: a device that nobody closed, because something else failed, does not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name=compute.name, daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Do nothing: what can run runs."""

    def submit(self, queue: OperationQueue, operation: Operation, *, wakes: bool = True) -> None:
        """Add the operation to the queue; have the thread run it, unless whoever calls is about to wait for it."""
        if queue is self._copy_queue:
            self._copies.submit(operation)
            return
        if isinstance(operation, Mark):
            self._n_marks += 1
            operation.place = self._n_marks
            if self._compute.is_empty and not self._is_busy:
                operation.was_reached = True
                return
        self._compute.append(operation)
        if isinstance(operation, Launch):
            self._left_to = None if wakes else threading.get_ident()
        if self._left_to is None and not isinstance(operation, Wait) and not self._is_called:
            self._is_called = True
            self._called.notify()

    def reach(self, mark: Mark) -> None:
        """Block the calling host thread until the mark is reached, or compute in the thread's place meanwhile."""
        while not mark.is_reached:
            if mark.asks is not None and not self._is_needed_for(mark):
                with self._unlocked():
                    self._copies.wait(mark)
            elif self._is_busy:
                self._reached.wait()
            else:
                self._go_on()

    def close(self) -> None:
        """End the threads when they have run all that was submitted."""
        with self.lock:
            self._is_closing = True
            self._called.notify()
        self._thread.join()
        self._copies.close()

    def _is_needed_for(self, mark: Mark) -> bool:
        """Return whether a copies' mark may wait for what was left to the calling thread to compute."""
        if self._left_to != threading.get_ident() or self._is_busy or self._compute.is_empty:
            return False
        awaited = self._compute.awaited
        return awaited is None or awaited.place < mark.place

    def _serve(self) -> None:
        """Run the compute queue whenever it is called to, until the executor is closed."""
        with torch.no_grad(), self.lock:
            while True:
                self._called.wait_for(lambda: not self._is_busy and (self._is_called or self._is_closing))
                if self._compute.is_empty:
                    return
                self._go_on()

    def _go_on(self) -> None:
        """Do what comes first in the compute queue, or wait for the copies that it waits for; nobody else does."""
        awaited = self._compute.awaited
        if awaited is not None:
            with self._busy():
                self._copies.wait(awaited)
            return
        operation = self._compute.take()
        if isinstance(operation, Launch):
            self._run(operation)
        elif isinstance(operation, Mark):
            self._copies.pass_mark(operation)
            self._reached.notify_all()
        if self._compute.is_empty:
            self._is_called, self._left_to = False, None
        elif self._is_called:
            self._called.notify()

    def _run(self, work: Launch) -> None:
        with self._busy():
            self._failure.run(work, self._compute.name)
        if self._failure.has_happened:
            self._copies.skip()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Let nobody else run the compute queue inside; the lock is free meanwhile."""
        self._is_busy = True
        try:
            with self._unlocked():
                yield
        finally:
            self._is_busy = False

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()
