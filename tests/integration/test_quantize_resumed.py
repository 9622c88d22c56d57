"""A conversion that was interrupted or killed goes on where it was, and ends with the same bytes as an undisturbed one.

Every run starts a worker process, which imports torch; what is compared or spoilt is made once.
"""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expertd.convert.config import QuantizeConfig
from tests.support.checkpoints import write_checkpoint, write_weights
from tests.support.half_done import (
    GOES_ON,
    N_MATRICES,
    N_TOLD,
    children_of,
    go_on,
    is_kept,
    kill_after,
    manifest_of,
    names_in,
    start_interrupted,
)
from tests.support.waiting import wait_for_exit

SIXTEEN_BIT = QuantizeConfig(experts="16bit", attention="16bit", head="16bit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", dtype="bf16")


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run; to be compared with, not changed."""
    store = tmp_path_factory.mktemp("stores") / "finished"
    go_on(checkpoint, store)
    return store


@pytest.fixture(scope="module")
def half_done(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a killed run left of `store`; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("half")
    kill_after(checkpoint, folder / "store", N_TOLD)
    return folder


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "KeyboardInterrupt\n"),
        (signal.SIGTERM, f"ended by SIGTERM before the store was complete{GOES_ON}\n"),
    ],
)
def test_an_interrupted_run_ends_its_workers_and_the_next_goes_on_from_there(
    checkpoint: Path, finished: Path, tmp_path: Path, number: signal.Signals, line: str
) -> None:
    with start_interrupted(checkpoint, tmp_path / "store") as process:
        workers = children_of(process.pid)

        process.send_signal(number)
        said, _ = process.communicate("")
    for worker in workers:
        wait_for_exit(worker)
    was_kept = is_kept(tmp_path)
    manifest, told = go_on(checkpoint, tmp_path / "store")

    assert said == line
    assert len(workers) == 2
    assert was_kept
    assert manifest == manifest_of(finished)
    assert len(told) <= N_MATRICES - (N_TOLD - 1)
    assert names_in(tmp_path) == ["store"]


def test_a_run_that_is_killed_five_times_ends_with_the_store_of_an_undisturbed_one(
    checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    rng = random.Random(20261125)
    store = tmp_path / "store"
    for _ in range(5):
        kill_after(checkpoint, store, rng.randrange(3, 9))
        assert is_kept(tmp_path)

    manifest, told = go_on(checkpoint, store)

    assert manifest == manifest_of(finished)
    assert len(told) <= N_MATRICES - 10
    assert told[-1].done_nbytes == told[-1].total_nbytes
    assert names_in(tmp_path) == ["store"]
    for name in names_in(finished):
        assert (store / name).read_bytes() == (finished / name).read_bytes(), name


def journal_of(folder: Path) -> Path:
    (path,) = folder.glob(".store.partial-*/journal")
    return path


def damage_a_record(folder: Path) -> None:
    (dense,) = folder.glob(".store.partial-*/store/dense.safetensors")
    data = bytearray(dense.read_bytes())
    data[4096] ^= 1
    dense.write_bytes(data)


def cut_the_journal(folder: Path) -> None:
    journal = journal_of(folder)
    journal.write_bytes(journal.read_bytes()[:-9])


def fill_the_journal_with_junk(folder: Path) -> None:
    journal_of(folder).write_bytes(b'["RecordDone", -1, ["bf16"], [0.0], ""]\n\xff\x00{[')


def claim_what_was_never_written(folder: Path) -> None:
    line = ["RecordDone", 20, ["3bit-g64"] * 3, [0.1] * 3, "0" * 32]
    journal = journal_of(folder)
    journal.write_bytes(json.dumps(line).encode() + b"\n" + journal.read_bytes())


def remove_what_was_written(folder: Path) -> None:
    (dense,) = folder.glob(".store.partial-*/store/dense.safetensors")
    dense.unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        damage_a_record,
        cut_the_journal,
        fill_the_journal_with_junk,
        claim_what_was_never_written,
        remove_what_was_written,
    ],
)
def test_what_was_lost_of_the_finished_records_is_made_again(
    checkpoint: Path, finished: Path, half_done: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)

    manifest, _ = go_on(checkpoint, tmp_path / "store")

    assert manifest == manifest_of(finished)


def test_another_configuration_does_not_go_on_with_what_was_kept(
    checkpoint: Path, half_done: Path, tmp_path: Path
) -> None:
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)

    manifest, told = go_on(checkpoint, tmp_path / "store", SIXTEEN_BIT)

    assert manifest.schemes.experts == "bf16"
    assert len(told) == N_MATRICES
    assert names_in(tmp_path) == ["store"]


def test_a_changed_checkpoint_does_not_go_on_with_what_was_kept(
    checkpoint: Path, finished: Path, half_done: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "c")
    shutil.copytree(half_done, tmp_path / "out")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    write_weights(copy, tensors)

    manifest, told = go_on(copy, tmp_path / "out" / "store")

    assert len(told) == N_MATRICES
    assert manifest.dense["embed_tokens"] != manifest_of(finished).dense["embed_tokens"]
    assert manifest.experts == manifest_of(finished).experts


def test_a_run_that_is_killed_before_the_store_moves_to_its_place_is_finished_by_the_next(
    checkpoint: Path, finished: Path, tmp_path: Path
) -> None:
    kill_after(checkpoint, tmp_path / "store", N_MATRICES)
    (folder,) = tmp_path.glob(".store.partial-*/store")
    shutil.copy(finished / "config.json", folder)
    (folder / "manifest.json").write_bytes(b"cut")

    manifest, told = go_on(checkpoint, tmp_path / "store")

    assert manifest == manifest_of(finished) == manifest_of(tmp_path / "store")
    assert len(told) <= 3
    assert names_in(tmp_path) == ["store"]
