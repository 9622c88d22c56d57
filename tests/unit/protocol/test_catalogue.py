import dataclasses
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest

from protocol.catalogue import (
    Catalogue,
    decode_catalogue,
    encode_catalogue,
    plan_catalogue,
    plan_tiered_catalogue,
)
from protocol.errors import MalformedMessage, ManifestError, SegmentError
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.manifest import dump_manifest, load_manifest
from protocol.segment import SegmentKind
from tests.support.stores import write_random_store

KEY = ExpertKey(0, 1)


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return plan_catalogue(write_random_store(tmp_path / "store"))


@pytest.fixture
def tiered(tmp_path: Path) -> Catalogue:
    return plan_tiered_catalogue(write_random_store(tmp_path / "tiered"), {KEY}, n_slots=3)


def with_handle(catalogue: Catalogue, **changes: int) -> Catalogue:
    handle = catalogue.experts[KEY]._replace(**changes)  # type: ignore[arg-type]
    return dataclasses.replace(catalogue, experts=catalogue.experts | {KEY: handle})


def test_a_catalogue_comes_out_as_it_went_in(catalogue: Catalogue) -> None:
    assert decode_catalogue(encode_catalogue(catalogue)) == catalogue


def test_a_store_that_another_version_wrote_keeps_its_digest(tmp_path: Path) -> None:
    document = json.loads(dump_manifest(write_random_store(tmp_path / "store")))
    del document["digest"], document["weight_errors"]
    body = json.dumps(document, indent=1).encode()
    older = load_manifest(b'{"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:])

    served = decode_catalogue(encode_catalogue(plan_catalogue(older))).manifest

    assert served.digest == older.digest == hashlib.sha256(body).hexdigest()


def test_records_do_not_overlap_and_segments_are_no_longer_than_they_need(catalogue: Catalogue) -> None:
    handles: list[DenseHandle | ExpertHandle] = [*catalogue.dense.values(), *catalogue.experts.values()]

    for segment, nbytes in enumerate(catalogue.segments_nbytes):
        spans = sorted((h.offset, h.offset + h.nbytes) for h in handles if h.segment == segment)
        assert all(start >= end for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] == nbytes


def test_dense_weights_have_segments_of_their_own(catalogue: Catalogue) -> None:
    dense = {handle.segment for handle in catalogue.dense.values()}

    assert dense.isdisjoint(handle.segment for handle in catalogue.experts.values())


@pytest.mark.parametrize("changes", [{"offset": 1 << 40}, {"segment": 9}, {"nbytes": 4096}], ids=str)
def test_a_handle_outside_its_segment_is_refused(catalogue: Catalogue, changes: dict[str, int]) -> None:
    data = encode_catalogue(with_handle(catalogue, **changes))

    with pytest.raises(SegmentError, match=str(KEY)):
        decode_catalogue(data)


def test_a_catalogue_without_a_dense_tensor_is_refused(catalogue: Catalogue) -> None:
    data = encode_catalogue(dataclasses.replace(catalogue, dense={}))

    with pytest.raises(SegmentError, match="does not place every dense tensor"):
        decode_catalogue(data)


def test_a_corrupt_expert_simply_has_no_handle(catalogue: Catalogue) -> None:
    experts = {key: handle for key, handle in catalogue.experts.items() if key != KEY}

    decoded = decode_catalogue(encode_catalogue(dataclasses.replace(catalogue, experts=experts)))

    assert KEY not in decoded.experts
    assert KEY in decoded.manifest.experts


@pytest.mark.parametrize("data", [b"", b"\x94", b"\x95\xc4\x00\x90\xc0\x90\x90", b"\xc0", b"\x93\x01\x02\x03"])
def test_junk_is_no_catalogue(data: bytes) -> None:
    with pytest.raises((SegmentError, MalformedMessage, ManifestError)):
        decode_catalogue(data)


def test_a_tiered_catalogue_comes_out_as_it_went_in(tiered: Catalogue) -> None:
    assert decode_catalogue(encode_catalogue(tiered)) == tiered


def test_a_tiered_catalogue_places_pinned_experts_and_slots_for_the_others(tiered: Catalogue) -> None:
    kinds = [tiered.kind(segment) for segment in range(len(tiered.segments_nbytes))]

    assert list(tiered.experts) == [KEY]
    assert kinds == [SegmentKind.SEALED, SegmentKind.SEALED, SegmentKind.SLOTS, SegmentKind.SLOT_TABLE]
    assert tiered.slots is not None
    assert tiered.segments_nbytes[2] == 3 * tiered.slots.slot_nbytes
    assert tiered.slots.slot_nbytes == max(record.nbytes for record in tiered.manifest.experts.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"slot_nbytes": 4096},
        {"n_slots": 0},
        {"n_slots": 4},
        {"slots_per_segment": 0},
        {"first_segment": 1},
        {"table_segment": 4},
    ],
    ids=str,
)
def test_slots_that_are_not_what_the_segments_say_are_refused(tiered: Catalogue, changes: dict[str, int]) -> None:
    assert tiered.slots is not None
    data = encode_catalogue(dataclasses.replace(tiered, slots=dataclasses.replace(tiered.slots, **changes)))

    with pytest.raises(SegmentError, match="slots"):
        decode_catalogue(data)


def test_a_handle_may_not_lie_in_a_slot(tiered: Catalogue) -> None:
    data = encode_catalogue(with_handle(tiered, segment=2))

    with pytest.raises(SegmentError, match=str(KEY)):
        decode_catalogue(data)
