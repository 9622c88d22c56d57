"""The daemon: how soon an empty one is ready, what it holds, how fast a store is loaded, how fast one attaches."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.errors import CommandFailed
from benchmarks.figures import Figure
from benchmarks.processes import Environment

_ATTACHES_PER_RUN = 20

# In a process of its own, so that a first attach is one; prints seconds from before hello to all segments mapped.
_ATTACH = """
import sys, time
from pathlib import Path
from protocol.control_client import ControlClient
from runner.client import AttachedStore, attach
from runner.config import RunnerConfig, my_runtime_dir
digest = attach(Path(sys.argv[1]), RunnerConfig()).manifest.digest
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    with AttachedStore(Path(sys.argv[1]), ControlClient(my_runtime_dir()), digest, started_daemon=False):
        print(time.perf_counter() - start)
"""


def measure_start(environment: Environment, _store: Path, runs: int) -> list[Figure]:
    """Return the time from spawning an empty daemon to READY, and its private memory then."""
    ready_s, private_mb = [], []
    for _ in range(runs):
        reader, writer = os.pipe()
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "expertd", "start", "--foreground", "--ready-fd", str(writer)],
            env=environment.variables,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
        )
        os.close(writer)
        if os.read(reader, 1) != b"R":
            raise CommandFailed("the daemon did not become ready")
        ready_s.append(time.perf_counter() - start)
        os.close(reader)
        status = json.loads(environment.expertd("status", "--json"))
        private_mb.append(status["private_nbytes"] / 1e6)
        process.terminate()
        process.wait()
    return [
        Figure("empty daemon: process start to READY", "s", tuple(ready_s)),
        Figure("empty daemon: private memory", "MB", tuple(private_mb)),
    ]


def measure_load(environment: Environment, store: Path, runs: int) -> list[Figure]:
    """Return how fast the store goes from files to sealed segments, the daemon's own word."""
    rates, seconds = [], []
    for _ in range(runs):
        with environment.daemon(store):
            held = json.loads(environment.expertd("status", "--json"))["stores"][0]
        rates.append(held["nbytes"] / held["load_s"] / 1e9)
        seconds.append(held["load_s"])
    return [Figure("load: read, check, seal", "GB/s", tuple(rates)), Figure("load", "s", tuple(seconds))]


def measure_attach(environment: Environment, store: Path, runs: int) -> list[Figure]:
    """Return the time from before hello until every segment is mapped."""
    samples: list[float] = []
    with environment.daemon(store):
        for _ in range(runs):
            command = [sys.executable, "-c", _ATTACH, str(store), str(_ATTACHES_PER_RUN)]
            result = subprocess.run(command, env=environment.variables, capture_output=True, text=True, check=True)
            samples += [float(line) * 1000 for line in result.stdout.split()]
    return [Figure("attach: hello to mapped", "ms", tuple(samples))]
