"""Conversions that are ended half way, and what is left of them."""

import subprocess
import sys
from pathlib import Path

from expertd.convert.config import QuantizeConfig
from expertd.convert.quantize import quantize_checkpoint
from expertd.convert.work import Progress
from protocol.manifest import Manifest, load_manifest
from tests.support.waiting import wait_for_exit

QUANTIZED = QuantizeConfig(experts="3bit-g64", attention="2bit-g16", head="4bit-g64")
# Matrices of the checkpoint that `write_checkpoint` makes.
N_MATRICES = 41
# Dense records have one matrix each and come first: when so many matrices are told of, so many less one are finished.
N_TOLD = 5
GOES_ON = "; what is finished is kept, and the same command goes on from there"

# Says READY when some matrices are written, then waits to be ended.
INTERRUPTED = """
import sys
from pathlib import Path
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import Terminated
from expertd.convert.quantize import quantize_checkpoint

n_left = int(sys.argv[3])
def wait_for_the_signal(progress):
    global n_left
    n_left -= 1
    if n_left == 0:
        print("READY", flush=True)
        sys.stdin.read()
config = QuantizeConfig(experts="3bit-g64", attention="2bit-g16", head="4bit-g64")
try:
    quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), config, force=True, n_jobs=2,
                        on_progress=wait_for_the_signal)
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
except Terminated as error:
    print(error, flush=True)
"""


def start_interrupted(checkpoint: Path, store: Path, n_told: int = N_TOLD) -> subprocess.Popen[str]:
    """Return a process that has written so many matrices of a store and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(checkpoint), str(store), str(n_told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "READY\n"
    return process


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_of(store: Path) -> Manifest:
    return load_manifest((store / "manifest.json").read_bytes())


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_kept(folder: Path) -> bool:
    """Return whether a working folder, and nothing that looks like a store, is there."""
    (name,) = names_in(folder)
    return name.startswith(".store.partial-") and not list(folder.rglob("manifest.json"))


def go_on(checkpoint: Path, store: Path, config: QuantizeConfig = QUANTIZED) -> tuple[Manifest, list[Progress]]:
    """Run once more; return the manifest and what was told."""
    told: list[Progress] = []
    manifest = quantize_checkpoint(checkpoint, store, config, force=True, n_jobs=1, on_progress=told.append)
    return manifest, told


def kill_after(checkpoint: Path, store: Path, n_told: int) -> None:
    """Have a run killed that has told of so many matrices, and wait for the end of its workers."""
    with start_interrupted(checkpoint, store, n_told) as process:
        workers = children_of(process.pid)
        process.kill()
        process.communicate()
    for worker in workers:
        wait_for_exit(worker)
