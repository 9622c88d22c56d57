"""How fast experts come from disk into slots: with one reader thread and with eight; what the processor has of it.

One session asks for eight experts at a time and gives them back, through a whole store that lies in no cache. Bytes and
seconds are the daemon's own count of what that session was read and how long it waited.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.errors import CommandFailed
from benchmarks.figures import Figure, ratios
from benchmarks.processes import Environment, processor_s
from benchmarks.settings import Settings
from tests.support.stores import write_random_store

N_THREADS = (1, 8)
_N_LAYERS, _N_EXPERTS = 4, 16
_HIDDEN, _INTERMEDIATE = 2048, 4096  # 15 MB an expert

# Goes through all experts, eight at a time, and prints the bytes that were read for it and the seconds it waited.
_CLIENT = """
import sys, json
from protocol.handles import ExpertKey
from runner.config import my_runtime_dir
from tests.support.request_client import RequestClient
with RequestClient(my_runtime_dir(), sys.argv[1]) as client:
    keys = list(client.catalogue.manifest.experts)
    for start in range(0, len(keys), 8):
        batch = keys[start : start + 8]
        client.acquire(*batch)
        client.release(*batch)
    stats = client.stats()
    print(json.dumps([stats.read_nbytes, stats.waited_s]))
"""


def measure_slots(environment: Environment, settings: Settings) -> list[Figure]:
    """Return the speed of reading with one thread and with eight, and the processor time a GB."""
    gb_per_s: dict[int, list[float]] = {n: [] for n in N_THREADS}
    processor: list[float] = []
    with tempfile.TemporaryDirectory(prefix="expertd-bench-", dir=_beside_the_cache(settings)) as folder:
        store = Path(folder) / "store"
        size = {"hidden": _HIDDEN, "intermediate": _INTERMEDIATE}
        manifest = write_random_store(store, n_layers=_N_LAYERS, n_experts=_N_EXPERTS, **size)
        memory = str(manifest.dense_nbytes + manifest.experts_nbytes // 3)
        for _ in range(settings.rounds):
            for n_threads in N_THREADS:
                config = Path(folder) / "expertd.toml"
                config.write_text(f"reader_threads = {n_threads}\n")
                environment.expertd("start", str(store), "--config", str(config), "--memory", memory)
                try:
                    pid = int(json.loads(environment.expertd("status", "--json"))["pid"])
                    used_s = processor_s(pid)
                    nbytes, waited_s = _read_all(environment, manifest.digest)
                    processor.append((processor_s(pid) - used_s) / (nbytes / 1e9))
                finally:
                    environment.expertd("stop")
                gb_per_s[n_threads].append(nbytes / waited_s / 1e9)
    one, eight = gb_per_s[1], gb_per_s[8]
    return [
        Figure("experts into slots, 1 reader thread", "GB/s", tuple(one)),
        Figure("experts into slots, 8 reader threads", "GB/s", tuple(eight)),
        Figure("8 reader threads / 1", "", ratios(eight, one)),
        Figure("processor time, checksums included", "s/GB", tuple(processor)),
    ]


def _beside_the_cache(settings: Settings) -> Path:
    """Return a folder on the disk where stores are: what /tmp is on many machines is no disk."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    return settings.folder


def _read_all(environment: Environment, digest: str) -> tuple[int, float]:
    command = [sys.executable, "-c", _CLIENT, digest]
    result = subprocess.run(command, env=environment.variables, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CommandFailed(f"slots: the client failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    nbytes, waited_s = json.loads(result.stdout)
    return int(nbytes), float(waited_s)
