"""A damaged store: what is damaged is named and not served, everything else is."""

from pathlib import Path

import pytest

from protocol.handles import ExpertKey
from protocol.manifest import DENSE_FILE, Manifest
from protocol.messages import Code, StoreState
from runner.client import attach
from runner.config import RunnerConfig
from runner.errors import CorruptExpert, StoreChanged, StoreUnavailable
from tests.support.daemon import DaemonProcess, run_expertd
from tests.support.stores import EXPERTS_FILE, flip_byte

NO_AUTOSTART = RunnerConfig(autostart=False)
KEY = ExpertKey(1, 2)


def test_one_flipped_byte_costs_one_expert(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    data = (store / EXPERTS_FILE).read_bytes()
    flip_byte(store / EXPERTS_FILE, manifest.experts[KEY].offset + 1234)

    start = run_expertd("start", store)
    verify = run_expertd("verify", store)
    with attach(store, NO_AUTOSTART) as attached:
        with pytest.raises(CorruptExpert, match=r"layers\.1\.experts\.2 is corrupt"):
            attached.expert_record(KEY)
        others = {key: bytes(attached.expert_record(key)) for key in manifest.experts if key != KEY}

    assert start.returncode == 0
    assert f"{KEY} is corrupt and is not served" in start.stderr
    assert verify.returncode == 1
    assert f"{KEY}: its checksum is wrong" in verify.stderr
    assert others == {
        key: data[record.offset : record.offset + record.nbytes]
        for key, record in manifest.experts.items()
        if key != KEY
    }
    assert daemon.store(manifest.digest).corrupt == (KEY,)


def test_one_flipped_byte_in_a_dense_tensor_is_refused(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)

    start = run_expertd("start", store)
    with pytest.raises(StoreUnavailable, match="norm: its checksum is wrong"):
        attach(store, NO_AUTOSTART)

    assert start.returncode == 1
    assert "norm: its checksum is wrong" in start.stderr.splitlines()[-1]
    assert daemon.store(manifest.digest).state is StoreState.FAILED


def test_a_store_that_was_mended_is_attached_without_further_ado(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    """The daemon remembers why it failed; the runner has it tried again."""
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)
    failed = daemon.load(store, manifest.digest)
    flip_byte(store / DENSE_FILE, manifest.dense["norm"].offset)

    with attach(store, RunnerConfig()) as attached:
        key_bytes = bytes(attached.expert_record(KEY))

    assert failed.error is not None
    assert failed.error.code is Code.STORE_INVALID
    assert len(key_bytes) == manifest.experts[KEY].nbytes


def test_a_side_file_that_was_changed_is_not_handed_out(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)
    with attach(store, NO_AUTOSTART) as attached:
        flip_byte(store / "config.json", 0)

        with pytest.raises(StoreChanged, match=r"config\.json: not the file"):
            attached.side_file("config.json")


def test_a_store_remade_under_a_running_daemon_is_another_store(
    daemon: DaemonProcess, store: Path, manifest: Manifest
) -> None:
    from tests.support.stores import write_random_store

    daemon.load(store, manifest.digest)
    store.rename(store.parent / "old")
    remade = write_random_store(store, seed=7)

    with attach(store, RunnerConfig()) as attached:
        digest = attached.manifest.digest

    assert digest == remade.digest != manifest.digest
    assert {held.digest for held in daemon.status().stores} == {manifest.digest, remade.digest}


def test_files_that_vanish_after_the_load_do_not_matter(daemon: DaemonProcess, store: Path, manifest: Manifest) -> None:
    daemon.load(store, manifest.digest)
    data = (store / EXPERTS_FILE).read_bytes()
    (store / EXPERTS_FILE).unlink()
    (store / DENSE_FILE).unlink()

    with attach(store, NO_AUTOSTART) as attached:
        record = bytes(attached.expert_record(KEY))

    assert record == data[manifest.experts[KEY].offset :][: len(record)]
