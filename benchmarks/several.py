"""One, two and four runners that decode at the same time on one store: what they do together, and against one alone."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
                used_s, start = processor_s(pid), time.perf_counter()
                totals[count].append(_total_tokens_per_s(environment, settings.store, count, settings.threads))
                share = (processor_s(pid) - used_s) / (time.perf_counter() - start)
            daemon_shares.append(100 * share)
    return [
        Figure(f"the daemon beside {COUNTS[-1]} runners, of one processor", "%", tuple(daemon_shares)),
        *(Figure(f"{count} runner(s) at once, decode, together", "tok/s", tuple(totals[count])) for count in COUNTS),
        *(Figure(f"{count} runners together / one", "", ratios(totals[count], totals[1])) for count in COUNTS[1:]),
    ]


def _total_tokens_per_s(environment: Environment, store: Path, count: int, threads: int) -> float:
    with ExitStack() as stack:
        runners = [stack.enter_context(_ready(environment, store, threads)) for _ in range(count)]
        for process in runners:
            _say_go(process)
        return sum(_read(process) for process in runners)


@contextmanager
def _ready(environment: Environment, store: Path, threads: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", _RUNNER, str(store), str(_SECONDS), str(_CONTEXT), str(threads)]
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
