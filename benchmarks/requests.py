"""What a request costs: experts that lie in slots, acquired by several sessions at once, beside a bare ROUTER's echo.

Both sides are asked by the same loop in as many processes, one after the other in every round, with the same bytes: a
ratio is of one moment. The echo does nothing but send back what came. Store and slots are small; a request does not
touch what lies in a slot.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from benchmarks.errors import CommandFailed
from benchmarks.figures import Figure, ratios
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from tests.support.stores import write_random_store

N_SESSIONS = 4
_N_REQUESTS = 2000
_N_UNCOUNTED = 200

_ECHO = """
import sys, zmq
with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
    router.bind(sys.argv[1])
    print("ready", flush=True)
    while True:
        client, token, data = router.recv_multipart()
        router.send_multipart([client, data])
"""

# Takes the seconds of each round trip when it is told to, and prints them as JSON when it is told to again: whoever is
# through keeps still while the others ask. Without a store it asks the echo.
_CLIENT = """
import json, sys, time, zmq
from protocol.codec import encode
from protocol.control_client import ControlClient
from protocol.handles import ExpertKey
from protocol.messages import Acquire
from runner.config import my_runtime_dir
endpoint, digest, n_uncounted, n_requests = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
request = encode(Acquire(1, (ExpertKey(0, 0), ExpertKey(0, 1))))
with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
    token = b"t" * 16
    if digest:
        control = ControlClient(my_runtime_dir())
        control.attach(digest)
        token, endpoint = control.welcome.token, my_runtime_dir().request_endpoint
    socket.connect(endpoint)
    def ask():
        start = time.perf_counter()
        socket.send_multipart([token, request])
        socket.recv()
        return time.perf_counter() - start
    for _ in range(n_uncounted):
        ask()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = [ask() for _ in range(n_requests)]
    print("through", flush=True)
    sys.stdin.readline()
    print(json.dumps(seconds), flush=True)
"""


def measure_requests(environment: Environment, settings: Settings) -> list[Figure]:
    """Return p50 and p99 of an Acquire of two experts in slots, of an echo, and their ratio in every round."""
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as folder, ExitStack() as stack:
        store = Path(folder) / "store"
        manifest = write_random_store(store, n_experts=16)
        nbytes = manifest.dense_nbytes + manifest.experts_nbytes // 2
        environment.expertd("start", str(store), "--memory", str(nbytes))
        stack.callback(environment.expertd, "stop")
        endpoint = f"ipc://{folder}/echo"
        stack.enter_context(_echo(endpoint))
        of_echo, of_daemon = [], []
        for _ in range(settings.rounds):
            of_echo.append(_round(environment, [endpoint, ""]))
            of_daemon.append(_round(environment, ["", manifest.digest]))
    return [figure for percent in (50, 99) for figure in _figures(percent, of_echo, of_daemon)]


def _figures(percent: int, of_echo: Sequence[list[float]], of_daemon: Sequence[list[float]]) -> list[Figure]:
    echo = tuple(1e6 * _percentile(seconds, percent) for seconds in of_echo)
    daemon = tuple(1e6 * _percentile(seconds, percent) for seconds in of_daemon)
    return [
        Figure(f"echo, {N_SESSIONS} clients at once: p{percent}", "µs", echo),
        Figure(f"acquire, {N_SESSIONS} sessions at once: p{percent}", "µs", daemon),
        Figure(f"acquire / echo: p{percent}", "", ratios(daemon, echo)),
    ]


def _percentile(seconds: list[float], percent: int) -> float:
    return sorted(seconds)[len(seconds) * percent // 100]


def _round(environment: Environment, target: list[str]) -> list[float]:
    """Return the seconds of all round trips of sessions that ask at once; raise CommandFailed."""
    command = [sys.executable, "-c", _CLIENT, *target, str(_N_UNCOUNTED), str(_N_REQUESTS)]
    with ExitStack() as stack:
        clients = [stack.enter_context(_client(environment, command)) for _ in range(N_SESSIONS)]
        for client in clients:
            client.go()
        for client in clients:
            client.line()
        for client in clients:
            client.go()
        return [second for client in clients for second in json.loads(client.line())]


class _Client:
    """A process that asks, when it is told to."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self._stdin = stdin
        self._stdout = stdout
        if self.line() != "ready\n":
            raise CommandFailed("requests: a client failed")

    def go(self) -> None:
        """Have it go on."""
        self._stdin.write("go\n")
        self._stdin.flush()

    def line(self) -> str:
        """Return what it says next."""
        return self._stdout.readline()


@contextmanager
def _client(environment: Environment, command: list[str]) -> Iterator[_Client]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment.variables, text=True, stdin=pipe, stdout=pipe) as process:
        if process.stdin is None or process.stdout is None:
            raise CommandFailed("requests: a client has no pipes")
        yield _Client(process.stdin, process.stdout)


@contextmanager
def _echo(endpoint: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", _ECHO, endpoint], text=True, stdout=subprocess.PIPE) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise CommandFailed("requests: the echo failed")
            yield
        finally:
            process.kill()
