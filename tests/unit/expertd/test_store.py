"""A store on disk that is cut, changed, of another version or hostile is refused in one clear line."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertd.errors import StoreInvalid
from expertd.store import StoreFiles, read_manifest
from protocol.handles import ExpertKey
from protocol.manifest import DENSE_FILE, MANIFEST_FILE, Manifest, Record, dump_manifest
from tests.support.leaks import holdings
from tests.support.stores import EXPERTS_FILE, flip_byte, signed_body, signed_manifest, write_random_store

KEY = ExpertKey(1, 2)


def refusal_of(store: Path) -> str:
    """Return the one line with which opening that store is refused; nothing may stay open."""
    before = holdings()
    with pytest.raises(StoreInvalid) as caught, StoreFiles(store):
        pass
    assert holdings().beyond(before) == []
    line = str(caught.value)
    assert "\n" not in line
    return line


def rewrite(store: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Replace the manifest by a changed one, with a right digest."""
    (store / MANIFEST_FILE).write_bytes(dump_manifest(change(read_manifest(store))))


def rewrite_json(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's document and give it the digest that belongs to it."""
    document = json.loads((store / MANIFEST_FILE).read_bytes())
    change(document)
    (store / MANIFEST_FILE).write_bytes(signed_manifest(document))


def with_expert(manifest: Manifest, **changes: object) -> Manifest:
    """Return the manifest with one expert's record changed."""
    record = replace(manifest.experts[KEY], **changes)  # type: ignore[arg-type]
    return replace(manifest, experts=manifest.experts | {KEY: record})


def test_a_whole_store_opens_and_its_records_match(store: Path) -> None:
    with StoreFiles(store) as files:
        record = files.manifest.experts[KEY]
        target = memoryview(bytearray(record.nbytes))

        is_intact = files.read_record(record, target)

    data = (store / record.file).read_bytes()
    assert is_intact
    assert target == data[record.offset : record.offset + record.nbytes]


def test_a_flipped_byte_is_seen(store: Path) -> None:
    record = read_manifest(store).experts[KEY]
    flip_byte(store / record.file, record.offset + record.nbytes - 1)

    with StoreFiles(store) as files:
        is_intact = files.read_record(record, memoryview(bytearray(record.nbytes)))

    assert not is_intact


def test_no_directory_is_no_store(tmp_path: Path) -> None:
    line = refusal_of(tmp_path / "nothing")

    assert line == f"{tmp_path / 'nothing'}: no such store"


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    line = refusal_of(tmp_path / "file")

    assert "a store directory was expected" in line


@pytest.mark.parametrize("name", [MANIFEST_FILE, DENSE_FILE, EXPERTS_FILE])
def test_a_missing_file_is_named(store: Path, name: str) -> None:
    (store / name).unlink()

    line = refusal_of(store)

    assert line.startswith(f"{name}: missing")


@pytest.mark.parametrize("name", [MANIFEST_FILE, DENSE_FILE, EXPERTS_FILE])
def test_a_link_is_not_followed(store: Path, name: str) -> None:
    (store / name).rename(store / "elsewhere")
    (store / name).symlink_to(store / "elsewhere")

    line = refusal_of(store)

    assert line.startswith(f"{name}:")
    assert "links are not followed" in line


@pytest.mark.parametrize("name", [MANIFEST_FILE, DENSE_FILE])
def test_a_pipe_is_refused_and_not_waited_for(store: Path, name: str) -> None:
    (store / name).unlink()
    os.mkfifo(store / name)

    line = refusal_of(store)

    assert line.startswith(f"{name}: a regular file was expected")


@pytest.mark.parametrize("name", [DENSE_FILE, EXPERTS_FILE])
def test_a_cut_file_is_refused_before_anything_is_read(store: Path, name: str) -> None:
    size = (store / name).stat().st_size
    os.truncate(store / name, size - 1)

    line = refusal_of(store)

    assert line.startswith(f"{name}: {size - 1} bytes")
    assert "make the store again" in line


def test_a_cut_manifest_is_refused(store: Path) -> None:
    os.truncate(store / MANIFEST_FILE, (store / MANIFEST_FILE).stat().st_size - 10)

    line = refusal_of(store)

    assert line.startswith(f"{MANIFEST_FILE}: its digest does not match")


def test_a_changed_manifest_is_refused_by_its_digest(store: Path) -> None:
    text = (store / MANIFEST_FILE).read_text()
    (store / MANIFEST_FILE).write_text(text.replace('"solver":"none"', '"solver":"nine"'))

    line = refusal_of(store)

    assert "digest does not match" in line


def test_another_format_version_is_refused_by_its_number(store: Path) -> None:
    rewrite_json(store, lambda document: document.update(format_version=1))

    line = refusal_of(store)

    assert "format version 1" in line
    assert "reads version 2" in line


def test_an_endless_manifest_is_refused_by_its_length(store: Path) -> None:
    os.truncate(store / MANIFEST_FILE, 1 << 30)

    line = refusal_of(store)

    assert "that are allowed" in line


def test_a_deep_manifest_is_refused(store: Path) -> None:
    (store / MANIFEST_FILE).write_bytes(signed_body(b'{"experts":' + b"[" * 1_000_000))

    line = refusal_of(store)

    assert line.startswith(f"{MANIFEST_FILE}: not JSON")


def test_a_record_beyond_its_file_is_refused(store: Path) -> None:
    rewrite(store, lambda manifest: with_expert(manifest, offset=1 << 40))

    line = refusal_of(store)

    assert line.startswith(f"{EXPERTS_FILE}:")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"offset": 1}, "multiple of 4096"),
        ({"offset": -4096}, "whole number"),
        ({"offset": 1 << 63}, "whole number"),
        ({"nbytes": 1 << 41}, "whole number"),
        ({"nbytes": 4096}, "its parts need"),
        ({"layout_id": "r9"}, "r9"),
        ({"parts": ()}, "parts are expected"),
        ({"file": "../config.json"}, "not of the form"),
        ({"file": "/etc/passwd"}, "not of the form"),
        ({"xxh3_128": "x"}, "not of the form"),
    ],
)
def test_a_hostile_record_is_refused_by_its_name(store: Path, changes: dict[str, Any], word: str) -> None:
    rewrite(store, lambda manifest: with_expert(manifest, **changes))

    line = refusal_of(store)

    assert line.startswith(f"{KEY}:")
    assert word in line


def test_an_unknown_scheme_is_refused_by_its_name(store: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        parts = tuple(replace(part, scheme="5bit-g7") for part in manifest.experts[KEY].parts)
        return with_expert(manifest, parts=parts)

    rewrite(store, change)

    line = refusal_of(store)

    assert line.startswith(f"{KEY}:")
    assert "5bit-g7" in line


def test_absurd_shapes_are_refused(store: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        parts = tuple(replace(part, rows=1 << 39) for part in manifest.experts[KEY].parts)
        return with_expert(manifest, parts=parts)

    rewrite(store, change)

    line = refusal_of(store)

    assert "outside" in line


def test_an_expert_listed_twice_is_refused(store: Path) -> None:
    rewrite_json(store, lambda document: document["experts"].__setitem__(0, document["experts"][1]))

    line = refusal_of(store)

    assert "listed twice" in line


def test_an_expert_too_few_is_refused(store: Path) -> None:
    rewrite_json(store, lambda document: document["experts"].pop())

    line = refusal_of(store)

    assert "7 listed, 2 x 4 expected" in line


def test_a_model_without_experts_is_refused(store: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["model"]["n_layers"] = 0
        document["experts"] = []

    rewrite_json(store, change)

    line = refusal_of(store)

    assert "at least one is expected" in line


@pytest.mark.parametrize("name", ["\ud800", "\x1b[2J", "two\nlines"])
def test_a_name_that_cannot_be_printed_is_refused(store: Path, name: str) -> None:
    rewrite_json(store, lambda document: document["dense"][0].__setitem__(0, name))

    line = refusal_of(store)

    assert line.isprintable()
    assert "printable" in line


def test_records_in_ever_more_files_are_refused(tmp_path: Path) -> None:
    """Each file would be an open descriptor of the daemon."""
    store = tmp_path / "store"
    manifest = write_random_store(store, n_layers=1, n_experts=600)
    experts: dict[ExpertKey, Record] = {}
    for key, record in manifest.experts.items():
        experts[key] = replace(record, file=f"{key.expert}.safetensors", offset=0)
        os.link(store / EXPERTS_FILE, store / f"{key.expert}.safetensors")
    (store / MANIFEST_FILE).write_bytes(dump_manifest(replace(manifest, experts=experts)))

    line = refusal_of(store)

    assert "more than 512 files" in line


def test_a_store_moved_elsewhere_is_the_same_store(store: Path, tmp_path: Path) -> None:
    before = read_manifest(store).digest
    shutil.move(store, tmp_path / "moved")

    after = read_manifest(tmp_path / "moved").digest

    assert after == before
