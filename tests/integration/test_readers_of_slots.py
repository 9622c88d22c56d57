"""Processes read slots without a message while others have them filled anew: what a second look lets pass is right."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from protocol.manifest import Manifest
from tests.support.daemon import DaemonProcess
from tests.support.tiers import load_tiered

N_ROUNDS = 120

# Copies whatever the table says is there, looks again, and compares what passed with the file, until its input ends.
# Prints how many copies passed, how many were thrown away; a wrong one ends it.
_READER = """
import select, sys
from pathlib import Path
from runner.config import my_runtime_dir
from tests.support.request_client import RequestClient, file_bytes
store, digest = Path(sys.argv[1]), sys.argv[2]
with RequestClient(my_runtime_dir(), digest) as client:
    table, area = client.table, client.catalogue.slots
    right = {key: file_bytes(store, client.catalogue, key) for key in client.catalogue.manifest.experts}
    n_passed = n_thrown = 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for key, entry in table.present().items():
            segment, offset = area.place(entry.slot)
            copy = bytes(client.views[segment][offset : offset + len(right[key])])
            if not table.still_holds(key, entry):
                n_thrown += 1
                continue
            n_passed += 1
            assert copy == right[key], key
    table = None
    print(n_passed, n_thrown)
"""

# Has experts read in an order of its own, and compares what it leases with the file.
_ASKER = """
import random, sys
from pathlib import Path
from runner.config import my_runtime_dir
from tests.support.request_client import RequestClient, file_bytes
store, digest, n_rounds, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with RequestClient(my_runtime_dir(), digest) as client:
    right = {key: file_bytes(store, client.catalogue, key) for key in client.catalogue.manifest.experts}
    order = random.Random(seed)
    def check(granted):
        for handle in granted.handles:
            assert client.bytes_of(handle) == right[handle.key], handle
        client.release(*(handle.key for handle in granted.handles))
    for _ in range(n_rounds):
        client.prefetch(order.sample(sorted(right), 2))
        client.acquire(*order.sample(sorted(right), 3), after_each=check)
    print(client.stats().n_leases)
"""


def test_no_reader_ever_computes_from_what_is_half_there(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    load_tiered(daemon, store, manifest, n_slots=4)

    with ExitStack() as stack:
        readers = [_started(stack, _READER, store, manifest.digest) for _ in range(2)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        askers = [_started(stack, _ASKER, store, manifest.digest, N_ROUNDS, seed) for seed in range(3)]
        leases_left = [_said(asker) for asker in askers]
        looks = [_said(reader) for reader in readers]

    assert leases_left == [[0]] * 3
    assert sum(n_passed for n_passed, _ in looks) > N_ROUNDS
    assert sum(n_thrown for _, n_thrown in looks) > 0
    assert daemon.store(manifest.digest).n_loads > N_ROUNDS


def _started(stack: ExitStack, script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


def _said(process: "subprocess.Popen[str]") -> list[int]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [int(word) for word in output.split()]
