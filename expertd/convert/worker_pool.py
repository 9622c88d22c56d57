"""The converter's worker processes: starts them, hands them records, hears of their progress, ends them.

One thread, the caller's, talks to all of them and waits only in a select, a fraction of a second at a time, so that a
signal is seen soon. Knows neither tensors nor torch. A worker has one task at a time; whoever is done gets the next.
"""

import json
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from expertd.convert.errors import WorkerDied
from expertd.convert.interruption import Interruption
from expertd.convert.worker_messages import (
    Event,
    Failed,
    Job,
    MatrixDone,
    RecordDone,
    Task,
    dump_job,
    dump_task,
    load_event,
)

# A worker finds the packages where we found them, however we were started.
# With -P: nothing of the folder that the user happens to stand in is imported.
_COMMAND = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from expertd.convert.worker import main
main(sys.argv[2])
"""
_SIGNAL_CHECK_S = 0.2
_RECEIVE_NBYTES = 1 << 16


class _Worker:
    """One process and our end of the socket pair that is its standard input and output."""

    def __init__(self, job: Job, running: ExitStack) -> None:
        self.socket, theirs = socket.socketpair()
        running.enter_context(self.socket)
        command = [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path), dump_job(job)]
        with theirs:
            # Its own process group: Ctrl-C is the converter's to answer.
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), process_group=0)
        running.enter_context(self._process)
        running.callback(self._process.kill)
        self._unread = b""  # the beginning of a line that has not come whole

    def give(self, task: Task) -> None:
        """Hand it a task. Whether it is still there is seen when it is heard."""
        with suppress(ConnectionError):
            self.socket.sendall(dump_task(task))

    def events(self) -> list[Event]:
        """Return what it said; block until it says something; raise WorkerDied if it never will."""
        try:
            data = self.socket.recv(_RECEIVE_NBYTES)
        except ConnectionError:
            data = b""
        if not data:
            raise WorkerDied(_story(self._process.wait()))
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [load_event(line) for line in lines]


def encode_records(
    tasks: Iterable[Task],
    job: Job,
    asked: Interruption,
    *,
    n_jobs: int,
    on_event: Callable[[MatrixDone | RecordDone], None],
) -> None:
    """Have those tasks done in whatever order, telling `on_event` of each matrix and record; raise ConvertError."""
    todo = iter(tasks)
    with _started(job, n_jobs) as (workers, selector):
        n_busy = sum(_give_next(worker, todo) for worker in workers)
        while n_busy:
            asked.check()
            for key, _ in selector.select(_SIGNAL_CHECK_S):
                worker = key.data
                for event in worker.events():
                    if isinstance(event, Failed):
                        raise event.error()
                    on_event(event)
                    if isinstance(event, RecordDone):
                        n_busy += _give_next(worker, todo) - 1


@contextmanager
def _started(job: Job, n_jobs: int) -> Iterator[tuple[list[_Worker], selectors.BaseSelector]]:
    """Yield running workers and a selector of their events; on leaving they are ended, whatever they do."""
    with ExitStack() as running:
        selector = running.enter_context(selectors.DefaultSelector())
        workers = [_Worker(job, running) for _ in range(n_jobs)]
        for worker in workers:
            selector.register(worker.socket, selectors.EVENT_READ, worker)
        yield workers, selector


def _give_next(worker: _Worker, todo: Iterator[Task]) -> bool:
    """Return whether there was something left to give."""
    task = next(todo, None)
    if task is None:
        return False
    worker.give(task)
    return True


def _story(returncode: int) -> str:
    if returncode < 0:
        cause = "; memory may have run out" if returncode == -9 else ""
        return f"a worker process was ended by signal {-returncode}{cause}"
    return f"a worker process ended with status {returncode}; what it said stands above"
