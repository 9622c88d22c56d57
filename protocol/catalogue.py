"""The catalogue: a store's manifest and where each record lies in the segments. Travels in a sealed segment itself.

With it the set of segments describes itself: who holds the descriptors needs nobody to explain them. Both sides check
every offset against the segments' sizes; a corrupt expert has no handle.
"""

from dataclasses import dataclass

from protocol.codec import pack, unpack
from protocol.errors import SegmentError
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.layout import plan_segments
from protocol.manifest import MANIFEST_NBYTES_MAX, Manifest, Record, dump_manifest, load_manifest

CATALOGUE_NBYTES_MAX = 2 * MANIFEST_NBYTES_MAX
_U63 = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the segments of one store hold."""

    manifest: Manifest
    segments_nbytes: tuple[int, ...]
    experts: dict[ExpertKey, ExpertHandle]
    dense: dict[str, DenseHandle]


def plan_catalogue(manifest: Manifest) -> Catalogue:
    """Return where every record of a store goes: dense weights first, then the experts, in the manifest's order."""
    dense_places = plan_segments([record.nbytes for record in manifest.dense.values()])
    first = dense_places[-1][0] + 1 if dense_places else 0
    expert_places = [
        (first + segment, offset)
        for segment, offset in plan_segments([record.nbytes for record in manifest.experts.values()])
    ]
    sizes: dict[int, int] = {}
    records: list[Record] = [*manifest.dense.values(), *manifest.experts.values()]
    for record, (segment, offset) in zip(records, [*dense_places, *expert_places], strict=True):
        sizes[segment] = offset + record.nbytes
    return Catalogue(
        manifest=manifest,
        segments_nbytes=tuple(sizes[segment] for segment in range(len(sizes))),
        experts={
            key: ExpertHandle(key, segment, offset, record.nbytes, 0)
            for (key, record), (segment, offset) in zip(manifest.experts.items(), expert_places, strict=True)
        },
        dense={
            name: DenseHandle(name, segment, offset, record.nbytes)
            for (name, record), (segment, offset) in zip(manifest.dense.items(), dense_places, strict=True)
        },
    )


def encode_catalogue(catalogue: Catalogue) -> bytes:
    """Return the catalogue's bytes."""
    return pack(
        [
            dump_manifest(catalogue.manifest),
            list(catalogue.segments_nbytes),
            [[*h.key, h.segment, h.offset, h.nbytes, h.generation] for h in catalogue.experts.values()],
            [[h.name, h.segment, h.offset, h.nbytes] for h in catalogue.dense.values()],
        ]
    )


def decode_catalogue(data: bytes) -> Catalogue:
    """Return the catalogue in those bytes; raise SegmentError, MalformedMessage or ManifestError."""
    plain = unpack(data, nbytes_max=CATALOGUE_NBYTES_MAX)
    if not isinstance(plain, list) or len(plain) != 4 or not isinstance(plain[0], bytes):
        raise SegmentError("the catalogue is no list of manifest, segments, experts and dense weights")
    manifest = load_manifest(plain[0])
    sizes = tuple(_numbers("segments", plain[1]))
    experts = {}
    for item in _rows("experts", plain[2], 6):
        layer, expert, segment, offset, nbytes, generation = _numbers("an expert's handle", item)
        handle = ExpertHandle(ExpertKey(layer, expert), segment, offset, nbytes, generation)
        _check_place(str(handle.key), sizes, handle, manifest.experts.get(handle.key))
        experts[handle.key] = handle
    dense = {}
    for name, *place in _rows("dense", plain[3], 4):
        segment, offset, nbytes = _numbers("a dense handle", place)
        dense_handle = DenseHandle(str(name), segment, offset, nbytes)
        _check_place(dense_handle.name, sizes, dense_handle, manifest.dense.get(dense_handle.name))
        dense[dense_handle.name] = dense_handle
    if dense.keys() != manifest.dense.keys():
        raise SegmentError("the catalogue does not place every dense tensor of the manifest")
    return Catalogue(manifest, sizes, experts, dense)


def _rows(name: str, value: object, width: int) -> list[list[object]]:
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == width for row in value):
        raise SegmentError(f"the catalogue's {name}: lists of {width} were expected")
    return value


def _numbers(name: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _U63 for item in value):
        raise SegmentError(f"the catalogue's {name}: whole numbers were expected")
    return value


def _check_place(name: str, sizes: tuple[int, ...], handle: ExpertHandle | DenseHandle, record: Record | None) -> None:
    if record is None or record.nbytes != handle.nbytes:
        raise SegmentError(f"{name}: the catalogue and the manifest disagree")
    end = handle.offset + handle.nbytes
    if handle.segment >= len(sizes) or end > sizes[handle.segment]:
        raise SegmentError(f"{name}: bytes {handle.offset} to {end} lie outside segment {handle.segment}")
