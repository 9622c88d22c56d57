"""The stand-in accelerator's queues in real time: a thread each, which waits out what a copy takes in the model.

A host thread that waits for what was computed computes it itself, if the queue's own thread has not begun: on the CPU
that is what an accelerator's time is worth, and waking the other thread would add what no accelerator takes.

Owns the threads. A queue's thread blocks on what its queue waits for; a host thread blocks until a mark is reached.
While it copies or waits a thread holds neither the lock nor the interpreter's lock: ctypes gives it up around memmove
and clock_nanosleep. A sleeper is woken some 30 us late; the kernel's own slack, 50 us by default, is set to 1 us for
these threads. Waiting awake would be more exact, and slow down whoever computes on the same cores.
"""

import ctypes
import threading
import time
from collections.abc import Sequence

import torch

from runner.devices.link_queue import Failure, Mark, Operation, OperationQueue, Wait, Work
from runner.devices.link_speed import LinkClock

_TIMER_ABSTIME = 1
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000


class _TimeSpec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class ThreadedExecutor:
    """Runs each queue in a thread of its own: `_serve` and what stands below it. Host threads call the rest."""

    def __init__(self, queues: Sequence[OperationQueue], failure: Failure, helped: OperationQueue) -> None:
        """Start the threads. The queue that is `helped` is run by a host thread that waits, too."""
        self._helped = helped
        self._is_running = False  # whether the helped queue's work is being run, by whichever thread
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

    def submit(self, queue: OperationQueue, operation: Operation, *, wakes: bool = True) -> None:
        """Add the operation to the queue, and wake its thread if it is the next one to run."""
        queue.append(operation)
        if wakes and queue.runnable is operation:
            self._changed[queue].notify()

    def reach(self, mark: Mark) -> None:
        """Block the calling host thread until the mark is reached, or do the queue's work in its place meanwhile."""
        while not mark.is_reached:
            operation = self._take_over(mark)
            if operation is None:
                self._reached.wait()
            elif isinstance(operation, Work):
                self._run_here(operation)
            else:
                self._pass(operation)

    def _take_over(self, mark: Mark) -> Operation | None:
        """Return what the host's thread can do to reach the mark, if it is the helped queue's, which is idle."""
        if self._is_running or self._helped.runnable is None or not self._helped.holds(mark):
            return None
        return self._helped.take(now=time.monotonic())

    def _run_here(self, work: Work) -> None:
        """Run one work of the helped queue, by whichever thread; under the lock, which is free meanwhile."""
        self._is_running = True
        self.lock.release()
        try:
            self._failure.run(work, self._helped.name)
        finally:
            self.lock.acquire()
            self._is_running = False

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
        with self.lock:
            work = self._next_work(queue, clock)
            if work is not None and queue is self._helped:
                self._run_here(work)
                return True
        if work is None:
            return False
        self._failure.run(work, queue.name)
        if work.duration_s > 0:
            self._wait_until(clock.end_of(work.duration_s, submitted_at_s=work.submitted_at_s))
        return True

    def _next_work(self, queue: OperationQueue, clock: LinkClock) -> Work | None:
        """Return the next work as soon as it can run, past marks and waits; None when no more comes; under the lock."""
        while True:
            self._changed[queue].wait_for(lambda: self._can_take(queue) or (self._is_closing and queue.is_empty))
            if queue.is_empty:
                return None
            operation = queue.take(now=time.monotonic())
            if isinstance(operation, Work):
                return operation
            self._pass(operation)
            if isinstance(operation, Wait) and operation.mark.reached_at_s is not None:
                clock.held_until(operation.mark.reached_at_s)

    def _can_take(self, queue: OperationQueue) -> bool:
        return queue.runnable is not None and not (queue is self._helped and self._is_running)

    def _pass(self, operation: Mark | Wait) -> None:
        """Go on past a mark, of which all are told that wait for it, or past a wait, which is over."""
        if isinstance(operation, Mark):
            self._reached.notify_all()
            for queue, changed in self._changed.items():
                if queue.runnable is not None:
                    changed.notify()

    def _wait_until(self, time_s: float) -> None:
        """Sleep in one call, which gives the interpreter up once: waiting awake would take it from who computes."""
        seconds = int(time_s)
        until = _TimeSpec(seconds, int((time_s - seconds) * 1e9))
        while self._libc.clock_nanosleep(time.CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(until), None):
            pass  # a signal's handler ran
