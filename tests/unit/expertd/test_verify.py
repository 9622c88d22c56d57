"""`verify` reads every byte and names what is wrong."""

import os
from pathlib import Path

import pytest

from expertd.errors import StoreInvalid
from expertd.verify import verify_store
from protocol.handles import ExpertKey
from protocol.manifest import DENSE_FILE, Manifest
from tests.support.stores import EXPERTS_FILE, flip_byte


def silent(_done: int, _total: int) -> None:
    pass


def test_a_whole_store_is_found_whole(store: Path, manifest: Manifest) -> None:
    report = verify_store(store, silent)

    assert report.wrong == ()
    assert report.n_checked == 8 + 2 + 1
    assert report.nbytes == manifest.experts_nbytes + manifest.dense_nbytes


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("key", [ExpertKey(0, 0), ExpertKey(1, 3)])
def test_one_flipped_byte_names_its_expert(store: Path, manifest: Manifest, key: ExpertKey, place: str) -> None:
    record = manifest.experts[key]
    flip_byte(store / EXPERTS_FILE, record.offset + (0 if place == "first" else record.nbytes - 1))

    report = verify_store(store, silent)

    assert report.wrong == (str(key),)


def test_every_damaged_thing_is_named(store: Path, manifest: Manifest) -> None:
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)
    flip_byte(store / EXPERTS_FILE, manifest.experts[ExpertKey(1, 1)].offset)
    flip_byte(store / "config.json", 0)

    report = verify_store(store, silent)

    assert report.wrong == ("norm", "layers.1.experts.1", "config.json")


def test_a_side_file_that_is_gone_is_named(store: Path) -> None:
    (store / "config.json").unlink()

    report = verify_store(store, silent)

    assert report.wrong == ("config.json",)


def test_progress_ends_with_everything(store: Path, manifest: Manifest) -> None:
    steps: list[tuple[int, int]] = []

    verify_store(store, lambda done, total: steps.append((done, total)))

    total = manifest.experts_nbytes + manifest.dense_nbytes
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_a_cut_store_is_refused(store: Path) -> None:
    os.truncate(store / EXPERTS_FILE, 4096)

    with pytest.raises(StoreInvalid, match="the file was cut"):
        verify_store(store, silent)
