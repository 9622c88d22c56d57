"""The stand-in accelerator's queues in real time: a thread each, which waits out what a copy takes in the model.

Owns the threads. A queue's thread blocks on what its queue waits for; a host thread blocks until a mark is reached.
While it copies or waits a thread holds neither the lock nor the interpreter's lock: ctypes gives it up around memmove
and sched_yield. The end of a copy is waited for asleep and, in the last tenth of a millisecond, awake: a sleeper is
woken about that late. The kernel's own slack, 50 us by default, is set to 1 us for these threads.
"""

import ctypes
import threading
import time
from collections.abc import Sequence

import torch

from runner.devices.link_queue import Failure, Mark, Operation, OperationQueue, Wait, Work
from runner.devices.link_speed import LinkClock

_AWAKE_S = 100e-6
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000


class ThreadedExecutor:
    """Runs each queue in a thread of its own: `_serve` and what stands below it. Host threads call the rest."""

    def __init__(self, queues: Sequence[OperationQueue], failure: Failure) -> None:
        self.lock = threading.Lock()
        self._failure = failure
        self._is_closing = False
        # One condition a queue, and one for all host threads: a mark must not wake whoever has no use for it.
        self._changed = {queue: threading.Condition(self.lock) for queue in queues}
        self._reached = threading.Condition(self.lock)
        self._libc = ctypes.CDLL(None)
        # Daemons: a device that nobody closed, because something else failed, does not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._serve, args=(queue,), name=queue.name, daemon=True) for queue in queues
        ]
        for thread in self._threads:
            thread.start()

    def progress(self) -> None:
        """Do nothing: the threads run what can run."""

    def submit(self, queue: OperationQueue, operation: Operation) -> None:
        """Add the operation to the queue, and wake its thread if it is the next one to run."""
        queue.append(operation)
        if queue.runnable is operation:
            self._changed[queue].notify()

    def reach(self, mark: Mark) -> None:
        """Block the calling host thread until the mark is reached."""
        self._reached.wait_for(lambda: mark.is_reached)

    def close(self) -> None:
        """End the threads when they have run all that was submitted."""
        with self.lock:
            self._is_closing = True
            for changed in self._changed.values():
                changed.notify()
        for thread in self._threads:
            thread.join()

    def _serve(self, queue: OperationQueue) -> None:
        """Run the queue's operations one after the other until the executor is closed."""
        self._libc.prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)
        clock = LinkClock()
        with torch.no_grad():
            while self._run_next(queue, clock):
                pass  # nothing of the work is held while the next one is waited for

    def _run_next(self, queue: OperationQueue, clock: LinkClock) -> bool:
        """Run the next work as soon as it can run, and wait out what it takes; return False when no more comes."""
        work = self._next_work(queue, clock)
        if work is None:
            return False
        self._failure.run(work, queue.name)
        if work.duration_s > 0:
            self._wait_until(clock.end_of(work.duration_s, submitted_at_s=work.submitted_at_s))
        return True

    def _next_work(self, queue: OperationQueue, clock: LinkClock) -> Work | None:
        """Return the next work as soon as it can run, past marks and waits; None when no more comes."""
        with self.lock:
            while True:
                self._changed[queue].wait_for(lambda: queue.runnable or (self._is_closing and queue.is_empty))
                if queue.is_empty:
                    return None
                operation = queue.take(now=time.monotonic())
                if isinstance(operation, Work):
                    return operation
                self._pass(operation, clock)

    def _pass(self, operation: Mark | Wait, clock: LinkClock) -> None:
        """Go on past a mark, of which all are told that wait for it, or past a wait, which is over."""
        if isinstance(operation, Mark):
            self._reached.notify_all()
            for queue, changed in self._changed.items():
                if queue.runnable is not None:
                    changed.notify()
        elif operation.mark.reached_at_s is not None:
            clock.held_until(operation.mark.reached_at_s)

    def _wait_until(self, time_s: float) -> None:
        asleep_s = time_s - time.monotonic() - _AWAKE_S
        if asleep_s > 0:
            threading.Event().wait(asleep_s)
        while time.monotonic() < time_s:
            self._libc.sched_yield()
