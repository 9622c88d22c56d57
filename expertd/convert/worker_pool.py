"""The converter's processes, workers and a fetcher: starts them, gives them work, hears of their progress, ends them.

One thread, the caller's, talks to all of them and waits only in a select, a fraction of a second at a time, so that a
signal is seen soon. Knows neither tensors nor torch, and not what is done in which order. A process has one thing to do
at a time; whoever is done is given the next.
"""

import json
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Protocol, TypeVar

from expertd.convert.errors import WorkerDied
from expertd.convert.fetch_messages import Fetched, FetchJob, dump_fetch_job, dump_shard
from expertd.convert.interruption import Interruption
from expertd.convert.shard import Shard
from expertd.convert.worker_messages import Done, Event, Failed, Job, RecordDone, Task, dump_job, dump_task, load_event

# A worker finds the packages where we found them, however we were started.
# With -P: nothing of the folder that the user happens to stand in is imported.
_COMMAND = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from expertd.convert.{module} import main
main(sys.argv[2])
"""
_Item = TypeVar("_Item")

_SIGNAL_CHECK_S = 0.2
_RECEIVE_NBYTES = 1 << 16


class Work(Protocol):
    """What is to be done, and who hears of it."""

    @property
    def is_done(self) -> bool: ...  # noqa: D102  # the name says it

    def next_task(self) -> Task | None:
        """Return what an idle worker is to do, None while there is nothing."""
        ...

    def next_shard(self) -> Shard | None:
        """Return what an idle fetcher is to fetch, None while there is nothing."""
        ...

    def take(self, event: Done) -> None:
        """Take down what was done."""
        ...


class _Process:
    """One process and our end of the socket pair that is its standard input and output."""

    def __init__(self, module: str, job: str, running: ExitStack) -> None:
        self.is_idle = True
        self.socket, theirs = socket.socketpair()
        running.enter_context(self.socket)
        code = _COMMAND.format(module=module)
        command = [sys.executable, "-P", "-c", code, json.dumps(sys.path), job]
        with theirs:
            # Its own process group: Ctrl-C is the converter's to answer.
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), process_group=0)
        running.enter_context(self._process)
        running.callback(self._process.kill)
        self._unread = b""  # the beginning of a line that has not come whole

    def give(self, line: bytes) -> None:
        """Hand it something to do. Whether it is still there is seen when it is heard."""
        self.is_idle = False
        with suppress(ConnectionError):
            self.socket.sendall(line)

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


def do_work(work: Work, job: Job, fetch_job: FetchJob | None, asked: Interruption, *, n_jobs: int) -> None:
    """Have all work done by `n_jobs` workers and, where there is a job for one, a fetcher; raise ConvertError."""
    with ExitStack() as running:
        selector = running.enter_context(selectors.DefaultSelector())
        workers = [_Process("worker", dump_job(job), running) for _ in range(n_jobs)]
        fetchers = [_Process("fetcher", dump_fetch_job(fetch_job), running)] if fetch_job is not None else []
        for process in (*workers, *fetchers):
            selector.register(process.socket, selectors.EVENT_READ, process)
        while not work.is_done:
            asked.check()
            _give(workers, work.next_task, dump_task)
            _give(fetchers, work.next_shard, dump_shard)
            for key, _ in selector.select(_SIGNAL_CHECK_S):
                for event in key.data.events():
                    if isinstance(event, Failed):
                        raise event.error()
                    key.data.is_idle |= isinstance(event, RecordDone | Fetched)
                    work.take(event)


def _give(processes: Iterable[_Process], next_one: Callable[[], _Item | None], dump: Callable[[_Item], bytes]) -> None:
    for process in processes:
        if process.is_idle and (item := next_one()) is not None:
            process.give(dump(item))


def _story(returncode: int) -> str:
    if returncode < 0:
        cause = "; memory may have run out" if returncode == -9 else ""
        return f"a worker process was ended by signal {-returncode}{cause}"
    return f"a worker process ended with status {returncode}; what it said stands above"
