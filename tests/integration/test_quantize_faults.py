"""What is left when a conversion is refused, fails, is interrupted or killed, or runs out of disk: nothing half-done.

Every run starts a worker process, which imports torch; the store that is replaced or compared with is made once.
"""

import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConfigError, NoDiskSpace, NotFinite, StoreExists, WorkerDied
from expertd.convert.quantize import Progress, quantize_checkpoint
from protocol.manifest import Manifest, load_manifest
from tests.support.checkpoints import write_checkpoint, write_weights

SIXTEEN_BIT = QuantizeConfig(experts="16bit", attention="16bit", head="16bit")
QUANTIZED = QuantizeConfig(experts="3bit-g64", attention="2bit-g16", head="4bit-g64")
# More than two workers with a record each can have told of when the signal is seen; the checkpoint has 41.
N_MATRICES_FOR_TWO = 8
FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def quantize(checkpoint: Path, store: Path, config: QuantizeConfig, *, force: bool = False) -> Manifest:
    return quantize_checkpoint(checkpoint, store, config, force=force, n_jobs=1, on_progress=lambda _: None)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_of(store: Path) -> Manifest:
    return load_manifest((store / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", dtype="bf16")


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store; to be copied, not changed."""
    store = tmp_path_factory.mktemp("stores") / "finished"
    quantize(checkpoint, store, QUANTIZED)
    return store


def test_an_existing_store_is_replaced_with_force_alone(checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    store = shutil.copytree(finished, tmp_path / "store")

    with pytest.raises(StoreExists):
        quantize(checkpoint, store, SIXTEEN_BIT)
    manifest = quantize(checkpoint, store, SIXTEEN_BIT, force=True)

    assert manifest.schemes.experts == "bf16"
    assert manifest_of(store) == manifest
    assert names_in(tmp_path) == ["store"]


def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_left(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[FIRST_EXPERT][5, 7] = float("nan")
    write_weights(checkpoint, tensors)

    with pytest.raises(NotFinite) as refusal:
        quantize(checkpoint, tmp_path / "store", SIXTEEN_BIT)

    assert str(refusal.value) == f"{FIRST_EXPERT}: holds weights that are NaN or infinite; the checkpoint is damaged"
    assert names_in(tmp_path) == ["c"]


def test_no_workers_at_all_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        quantize_checkpoint(
            checkpoint, tmp_path / "store", QUANTIZED, force=False, n_jobs=0, on_progress=lambda _: None
        )

    assert str(refusal.value) == "worker processes: at least 1 is expected, 0 came"


def test_an_error_of_the_caller_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise LookupError(progress.tensor)

    with pytest.raises(LookupError):
        quantize_checkpoint(checkpoint, tmp_path / "store", QUANTIZED, force=False, n_jobs=1, on_progress=fail)

    assert names_in(tmp_path) == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed_is_an_error_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def kill_a_worker(_: Progress) -> None:
        os.kill(children_of(os.getpid())[-1], signal.SIGKILL)

    with pytest.raises(WorkerDied) as death:
        quantize_checkpoint(checkpoint, tmp_path / "store", QUANTIZED, force=False, n_jobs=1, on_progress=kill_a_worker)

    assert str(death.value) == "a worker process was ended by signal 9; memory may have run out"
    assert names_in(tmp_path) == []


# Says READY when the first matrix is written, then waits to be ended; says how many matrices it heard of in all.
INTERRUPTED = """
import sys
from pathlib import Path
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import Terminated
from expertd.convert.quantize import quantize_checkpoint

told = []
def wait_for_the_signal(progress):
    told.append(progress)
    if len(told) == 1:
        print("READY", flush=True)
        sys.stdin.read()
try:
    quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeConfig(), force=True, n_jobs=2,
                        on_progress=wait_for_the_signal)
except KeyboardInterrupt:
    print(len(told), "KeyboardInterrupt", flush=True)
except Terminated as error:
    print(len(told), error, flush=True)
"""


def start_interrupted(checkpoint: Path, store: Path) -> subprocess.Popen[str]:
    """Return a process that has written a part of a store and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(checkpoint), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "READY\n"
    return process


def wait_for_the_end_of(pid: int) -> None:
    """Return when that process, no child of ours, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        ended = selector.select(timeout=60)
    os.close(fd)
    assert ended


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "KeyboardInterrupt\n"),
        (signal.SIGTERM, "ended by SIGTERM before the store was complete; nothing was kept\n"),
    ],
)
def test_an_interrupted_run_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals, line: str) -> None:
    with start_interrupted(checkpoint, tmp_path / "store") as process:
        half_done = names_in(tmp_path)
        workers = children_of(process.pid)

        process.send_signal(number)
        said, _ = process.communicate("")

    assert half_done[0].startswith(".store.partial-")
    n_told, _, ending = said.partition(" ")
    assert ending == line
    assert int(n_told) < N_MATRICES_FOR_TWO
    assert names_in(tmp_path) == []
    assert len(workers) == 2
    for worker in workers:
        wait_for_the_end_of(worker)


def test_a_killed_run_leaves_nothing_that_looks_like_a_store_and_the_next_clears_it_away(
    checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    with start_interrupted(checkpoint, tmp_path / "store") as process:
        workers = children_of(process.pid)

        process.kill()
        process.communicate()
    for worker in workers:
        wait_for_the_end_of(worker)
    left = names_in(tmp_path)
    manifests = list(tmp_path.rglob("manifest.json"))
    manifest = quantize(checkpoint, tmp_path / "store", QUANTIZED)

    assert [name.startswith(".store.partial-") for name in left] == [True]
    assert manifests == []
    assert manifest == manifest_of(finished)
    assert names_in(tmp_path) == ["store"]


def test_a_killed_replacement_leaves_the_old_store(checkpoint: Path, finished: Path, tmp_path: Path) -> None:
    store = shutil.copytree(finished, tmp_path / "store")

    with start_interrupted(checkpoint, store) as process:
        process.kill()
        process.communicate()

    assert manifest_of(store) == manifest_of(finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 1 MiB."""
    folder, mount, unmount = tmp_path / "disk", shutil.which("mount"), shutil.which("umount")
    folder.mkdir()
    if mount is None or unmount is None:
        pytest.skip("needs mount and umount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run([unmount, str(folder)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "other").open("ab", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass


def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(checkpoint: Path, small_disk: Path) -> None:
    fill(small_disk)
    told: list[Progress] = []

    with pytest.raises(NoDiskSpace) as refusal:
        quantize_checkpoint(checkpoint, small_disk / "store", QUANTIZED, force=False, n_jobs=1, on_progress=told.append)

    assert str(refusal.value) == f"{small_disk / 'store'}: the store needs 0.3 MB, {small_disk} has 0.0 MB free"
    assert told == []
    assert names_in(small_disk) == ["other"]


def test_a_disk_that_becomes_full_ends_the_run_and_nothing_is_left(checkpoint: Path, small_disk: Path) -> None:
    def fill_the_disk(_: Progress) -> None:
        fill(small_disk)

    with pytest.raises(NoDiskSpace) as refusal:
        quantize_checkpoint(
            checkpoint, small_disk / "store", QUANTIZED, force=False, n_jobs=1, on_progress=fill_the_disk
        )

    assert str(refusal.value) == (
        f"{small_disk / 'store'}: the file system became full (No space left on device); nothing was kept"
    )
    assert names_in(small_disk) == ["other"]
