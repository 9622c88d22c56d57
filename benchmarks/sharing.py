"""One, two and four runners on one store: what the machine's shared memory grows by, and what each has of its own."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.errors import CommandFailed
from benchmarks.figures import Figure
from benchmarks.processes import Environment, private_dirty_nbytes, shmem_nbytes

_COUNTS = (1, 2, 4)
_CONTEXT = 4096

# Generates, so that every buffer a session needs has been touched; then waits to be measured.
_RUNNER = """
import sys
import runner
with runner.open_engine(sys.argv[1], context=int(sys.argv[2])) as engine:
    prompt = engine.tokenizer.encode("Once upon a time there was a house by the sea.")
    n_tokens = len(list(engine.generate(prompt, max_new_tokens=16)))
    config = engine.config
    fp16_keys_and_values_nbytes = config.n_layers * config.n_kv_heads * config.head_dim * 2 * 2
    print(n_tokens, fp16_keys_and_values_nbytes * int(sys.argv[2]), flush=True)
    sys.stdin.read()
"""


def measure_sharing(environment: Environment, store: Path, _runs: int) -> list[Figure]:
    """Return shared and private memory with 1, 2 and 4 runners, in MB, and the largest a kv_cache can become."""
    figures = []
    before = shmem_nbytes()
    with environment.daemon(store):
        for count in _COUNTS:
            with ExitStack() as stack:
                runners = [stack.enter_context(_start(environment, store)) for _ in range(count)]
                kv_cache_nbytes = max([_wait(process) for process in runners])
                shared_mb = (shmem_nbytes() - before) / 1e6
                private_mb = tuple(private_dirty_nbytes(process.pid) / 1e6 for process in runners)
                for process in runners:
                    process.communicate()
            figures.append(Figure(f"shared memory with {count} runner(s)", "MB", (shared_mb,)))
            figures.append(Figure(f"Private_Dirty of each of {count} runner(s)", "MB", private_mb))
        figures.append(Figure(f"kv_cache of {_CONTEXT} tokens, when full", "MB", (kv_cache_nbytes / 1e6,)))
    return figures


def _start(environment: Environment, store: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _RUNNER, str(store), str(_CONTEXT)],
        env=environment.variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _wait(process: "subprocess.Popen[str]") -> int:
    """Wait until the runner has generated; return the bytes of its kv_cache when full."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise CommandFailed("a runner failed")
    return int(line.split()[1])
