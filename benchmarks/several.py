"""One, two and four runners that decode at the same time on one store: what they do together, and against one alone.

The store is resident, so that they need no message; what the daemon still does meanwhile is a figure, too.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.errors import CommandFailed, NothingToMeasure
from benchmarks.figures import Figure, ratios
from benchmarks.processes import Environment, processor_s
from benchmarks.settings import Settings

COUNTS = (1, 2, 4)

_SECONDS = 5.0
_CONTEXT = 128

# Warms up, says so, waits for the word to go, decodes for so many seconds, says how many tokens that were. Every runner
# takes the threads that it would take by itself.
_RUNNER = """
import sys, time
import runner
store, seconds, n_context, threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with runner.open_engine(store, context=1 << 16, threads=threads) as engine:
    sequence = engine.new_sequence()
    sequence.append([1 + 7 * i % (engine.config.vocab_size - 1) for i in range(n_context)])
    engine.step([sequence])
    print("ready", flush=True)
    sys.stdin.readline()
    n_tokens, start = 0, time.perf_counter()
    with engine.awake():
        while time.perf_counter() - start < seconds:
            sequence.append([(31 * n_tokens + 5) % engine.config.vocab_size])
            engine.step([sequence])
            n_tokens += 1
    print(n_tokens / (time.perf_counter() - start), flush=True)
"""


def measure_several(environment: Environment, settings: Settings) -> list[Figure]:
    """Return the tokens a second of 1, 2 and 4 runners together, and the ratios to one; raise BenchmarkError."""
    if settings.store is None:
        raise NothingToMeasure("several: a store is needed")
    totals: dict[int, list[float]] = {count: [] for count in COUNTS}
    daemon_shares = []
    with environment.daemon(settings.store):
        pid = int(json.loads(environment.expertd("status", "--json"))["pid"])
        for _ in range(settings.rounds):
            for count in COUNTS:
                together = _decode_together(environment, settings, count, pid)
                totals[count].append(together.tokens_per_s)
            daemon_shares.append(100 * together.daemon_share)
    return [
        Figure(f"the daemon while {COUNTS[-1]} runners decode, of one processor", "%", tuple(daemon_shares)),
        *(Figure(f"{count} runner(s) at once, decode, together", "tok/s", tuple(totals[count])) for count in COUNTS),
        *(Figure(f"{count} runners together / one", "", ratios(totals[count], totals[1])) for count in COUNTS[1:]),
    ]


@dataclass(frozen=True, slots=True)
class _Together:
    """What runners did together, and which share of a processor the daemon had meanwhile."""

    tokens_per_s: float
    daemon_share: float


def _decode_together(environment: Environment, settings: Settings, count: int, daemon_pid: int) -> _Together:
    with ExitStack() as stack:
        runners = [stack.enter_context(_ready(environment, settings)) for _ in range(count)]
        used_s, start = processor_s(daemon_pid), time.perf_counter()
        for process in runners:
            _say_go(process)
        tokens_per_s = sum(_read(process) for process in runners)
        return _Together(tokens_per_s, (processor_s(daemon_pid) - used_s) / (time.perf_counter() - start))


@contextmanager
def _ready(environment: Environment, settings: Settings) -> Iterator["subprocess.Popen[str]"]:
    numbers = (_SECONDS, _CONTEXT, settings.threads)
    command = [sys.executable, "-c", _RUNNER, str(settings.store), *map(str, numbers)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment.variables, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise CommandFailed("several: a runner failed")
            yield process
        finally:
            process.kill()


def _say_go(process: "subprocess.Popen[str]") -> None:
    if process.stdin is not None:
        process.stdin.write("go\n")
        process.stdin.flush()


def _read(process: "subprocess.Popen[str]") -> float:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise CommandFailed("several: a runner failed")
    return float(line)
