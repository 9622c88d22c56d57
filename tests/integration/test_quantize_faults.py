"""What is left when a conversion is refused, fails, is interrupted or killed, or runs out of disk: no half-done store,
and what is finished of one where the same command can go on from there.

Every run starts a worker process, which imports torch; the store that is replaced or compared with is made once.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import ConfigError, NoDiskSpace, NotFinite, StoreExists, WorkerDied
from expertd.convert.local_folder import LocalFolder
from expertd.convert.quantize import quantize_checkpoint, quantize_source
from expertd.convert.work import Progress
from protocol.manifest import Manifest
from tests.support.checkpoints import write_checkpoint, write_weights
from tests.support.half_done import (
    GOES_ON,
    N_MATRICES,
    N_TOLD,
    QUANTIZED,
    children_of,
    go_on,
    is_kept,
    manifest_of,
    names_in,
    start_interrupted,
)

SIXTEEN_BIT = QuantizeConfig(experts="16bit", attention="16bit", head="16bit")
FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def quantize(checkpoint: Path, store: Path, config: QuantizeConfig, *, force: bool = False) -> Manifest:
    return quantize_checkpoint(checkpoint, store, config, force=force, n_jobs=1, on_progress=lambda _: None)


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


def test_workers_that_take_more_than_the_limit_are_told_of_before_they_start(checkpoint: Path, tmp_path: Path) -> None:
    class Said(Exception):  # nothing is wrong
        pass

    def stop(line: str) -> None:
        raise Said(line)

    with pytest.raises(Said) as said:
        quantize_source(
            LocalFolder(checkpoint),
            tmp_path / "store",
            QUANTIZED,
            force=False,
            n_jobs=64,
            on_progress=lambda _: None,
            say=stop,
        )

    # There are 25 records to write.
    assert str(said.value) == ("25 workers hold up to 6.2 GB of memory together; without --jobs it is at most 3 GB")
    assert names_in(tmp_path) == []


def test_an_error_of_the_caller_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise LookupError(progress.tensor)

    with pytest.raises(LookupError):
        quantize_checkpoint(checkpoint, tmp_path / "store", QUANTIZED, force=False, n_jobs=1, on_progress=fail)

    assert names_in(tmp_path) == []


def test_a_worker_that_is_killed_is_an_error_and_what_is_finished_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    told: list[Progress] = []

    def kill_a_worker(progress: Progress) -> None:
        told.append(progress)
        if len(told) == N_TOLD:
            os.kill(children_of(os.getpid())[-1], signal.SIGKILL)

    with pytest.raises(WorkerDied) as death:
        quantize_checkpoint(checkpoint, tmp_path / "store", QUANTIZED, force=False, n_jobs=1, on_progress=kill_a_worker)

    assert str(death.value) == "a worker process was ended by signal 9; memory may have run out" + GOES_ON
    assert is_kept(tmp_path)


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

    assert str(refusal.value) == f"{small_disk / 'store'}: the store needs 0.2 MB, {small_disk} has 0.0 MB free"
    assert told == []
    assert names_in(small_disk) == ["other"]


def test_a_disk_that_becomes_full_ends_the_run_and_with_room_again_it_goes_on(
    checkpoint: Path, finished: Path, small_disk: Path
) -> None:
    told: list[Progress] = []

    def fill_the_disk(progress: Progress) -> None:
        told.append(progress)
        if len(told) == N_TOLD:
            fill(small_disk)

    with pytest.raises(NoDiskSpace) as refusal:
        quantize_checkpoint(
            checkpoint, small_disk / "store", QUANTIZED, force=False, n_jobs=1, on_progress=fill_the_disk
        )
    (small_disk / "other").unlink()
    was_kept = is_kept(small_disk)
    manifest, told_later = go_on(checkpoint, small_disk / "store")

    assert str(refusal.value) == (
        f"{small_disk / 'store'}: the file system became full (No space left on device){GOES_ON}"
    )
    assert was_kept
    assert manifest == manifest_of(finished)
    assert len(told_later) <= N_MATRICES - (N_TOLD - 1)
    assert names_in(small_disk) == ["store"]
