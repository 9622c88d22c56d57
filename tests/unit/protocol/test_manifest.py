import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ManifestError
from protocol.manifest import MANIFEST_FILE, dump_manifest, load_manifest, manifest_digest
from tests.support.stores import signed_manifest, write_random_store

Document = dict[str, Any]


@pytest.fixture
def document(tmp_path: Path) -> Document:
    write_random_store(tmp_path / "store")
    loaded: Document = json.loads((tmp_path / "store" / MANIFEST_FILE).read_text())
    return loaded


def test_a_manifest_comes_out_as_it_went_in(tmp_path: Path) -> None:
    manifest = write_random_store(tmp_path / "store")

    loaded = load_manifest(dump_manifest(manifest))

    assert loaded == manifest
    assert loaded.digest == manifest.digest


def test_errors_of_weights_come_out_as_they_went_in_and_may_be_left_out(tmp_path: Path) -> None:
    manifest = write_random_store(tmp_path / "store")
    measured = replace(manifest, weight_errors={"norm": (0.0,), "layers.1.experts.3": (0.0823, 1e-7, 0.25)})

    loaded = load_manifest(dump_manifest(measured))

    assert loaded.weight_errors == measured.weight_errors
    assert loaded.digest != manifest.digest
    assert load_manifest(dump_manifest(manifest)).weight_errors == {}


def test_the_digest_stands_for_every_record(tmp_path: Path) -> None:
    first = write_random_store(tmp_path / "a", seed=1)
    second = write_random_store(tmp_path / "b", seed=2)

    assert first.digest != second.digest


def test_changed_content_with_the_old_digest_is_refused(document: Document) -> None:
    data = signed_manifest(document).replace(b'"top_k":2', b'"top_k":3')

    with pytest.raises(ManifestError, match="digest does not match"):
        load_manifest(data)


@pytest.mark.parametrize("length", [0, 1, 50, 80, 500, -1])
def test_a_cut_manifest_is_refused(document: Document, length: int) -> None:
    data = signed_manifest(document)

    with pytest.raises(ManifestError):
        load_manifest(data[:length])


def test_a_digest_is_read_without_parsing_and_is_that_of_the_manifest(tmp_path: Path) -> None:
    manifest = write_random_store(tmp_path / "store")

    data = dump_manifest(manifest)

    assert manifest_digest(data) == manifest.digest == load_manifest(data).digest
    assert json.loads(data)["digest"] == manifest.digest


def test_another_format_version_is_refused_with_the_remedy(document: Document) -> None:
    document["format_version"] = 1

    with pytest.raises(ManifestError, match=r"format version 1, this expertd reads version 2; quantize .* again"):
        load_manifest(signed_manifest(document))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"text"'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        load_manifest(data)


HOSTILE: dict[str, tuple[Callable[[Document], object], str]] = {
    "no experts": (lambda d: d.pop("experts"), "experts: a list"),
    "an expert missing": (lambda d: d["experts"].pop(), "experts: 7 listed, 2 x 4 expected"),
    "an expert twice": (lambda d: d["experts"].append(d["experts"][0]), "listed twice"),
    "an expert of no layer": (lambda d: d["experts"][0].__setitem__(0, 2), "layer: a whole number from 0 to 1"),
    "a negative offset": (lambda d: d["experts"][0].__setitem__(5, -4096), "offset: a whole number"),
    "an unaligned offset": (lambda d: d["experts"][0].__setitem__(5, 4097), "not a multiple of 4096"),
    "a length that is not its parts'": (lambda d: d["experts"][0].__setitem__(6, 8192), "its parts need"),
    "an absurd length": (lambda d: d["experts"][0].__setitem__(6, 1 << 60), "nbytes: a whole number"),
    "a length that is a truth value": (lambda d: d["experts"][0].__setitem__(6, True), "nbytes: a whole number"),  # noqa: FBT003
    "a file outside": (lambda d: d["experts"][0].__setitem__(4, "../../etc/passwd"), "is not of the form"),
    "a hidden file": (lambda d: d["experts"][0].__setitem__(4, ".x"), "is not of the form"),
    "a file with a line end": (lambda d: d["experts"][0].__setitem__(4, "x\n"), "is not of the form"),
    "no checksum": (lambda d: d["experts"][0].__setitem__(7, ""), "is not of the form"),
    "an unknown layout": (lambda d: d["experts"][0].__setitem__(2, "r9"), "record layout 'r9' is not known"),
    "an unknown scheme": (lambda d: d["experts"][0][3][0].__setitem__(3, "1bit"), "scheme '1bit' is not known"),
    "absurd rows": (lambda d: d["experts"][0][3][0].__setitem__(1, 1 << 39), "outside 1.."),
    "no parts": (lambda d: d["experts"][0].__setitem__(3, []), "1 to 32 parts"),
    "a dense name too long": (lambda d: d["dense"][0].__setitem__(0, "x" * 300), "1 to 256 characters"),
    "an unknown field": (lambda d: d["model"].__setitem__("x", 1), "model: the fields"),
    "a side file outside": (lambda d: d["files"][0].__setitem__("name", "a/b"), "is not of the form"),
    "no object of errors": (lambda d: d.update(weight_errors=[]), "weight_errors: an object of lists"),
    "errors of no record": (lambda d: d.update(weight_errors={"x": [0.1]}), "'x' is no record of this store"),
    "too few errors": (
        lambda d: d.update(weight_errors={"layers.0.experts.1": [0.1]}),
        "weight_errors of layers.0.experts.1: a list of 3, one for each part, is expected",
    ),
    "an error below 0": (lambda d: d.update(weight_errors={"norm": [-0.1]}), "weight_errors of norm: a number from 0"),
    "an error that is no number": (lambda d: d.update(weight_errors={"norm": [float("nan")]}), "a number from 0"),
    "an error that is a text": (lambda d: d.update(weight_errors={"norm": ["0.1"]}), "a number from 0 .* '0.1' came"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(name: str, document: Document) -> None:
    damage, message = HOSTILE[name]
    damage(document)

    with pytest.raises(ManifestError, match=message):
        load_manifest(signed_manifest(document))
