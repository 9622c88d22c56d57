"""The catalogue: a store's manifest and where each record lies in the segments. Travels in a sealed segment itself.

With it the set of segments describes itself: who holds the descriptors needs nobody to explain them. Both sides check
every offset against the segments' sizes.

In a resident store an expert without a handle is corrupt. In a store that is larger than its budget the dense weights
and the pinned experts have handles, and the others are acquired: they come into slots, whose segments and table come
after the sealed segments.
"""

from collections.abc import Collection
from dataclasses import astuple, dataclass, replace

from protocol.codec import pack, unpack
from protocol.errors import SegmentError
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.layout import plan_segments
from protocol.manifest import MANIFEST_NBYTES_MAX, Manifest, Record, dump_manifest, load_manifest
from protocol.segment import SegmentKind
from protocol.slot_table import SLOTS_MAX, SlotArea, plan_slot_area

CATALOGUE_NBYTES_MAX = 2 * MANIFEST_NBYTES_MAX
_U63 = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the segments of one store hold. `slots` is None in a resident store."""

    manifest: Manifest
    segments_nbytes: tuple[int, ...]
    experts: dict[ExpertKey, ExpertHandle]
    dense: dict[str, DenseHandle]
    slots: SlotArea | None = None

    @property
    def n_sealed(self) -> int:
        """How many segments are sealed: the first ones."""
        return len(self.segments_nbytes) if self.slots is None else self.slots.first_segment

    def kind(self, segment: int) -> SegmentKind:
        """Return what a segment is for."""
        if self.slots is None or segment < self.n_sealed:
            return SegmentKind.SEALED
        return SegmentKind.SLOT_TABLE if segment == self.slots.table_segment else SegmentKind.SLOTS


def plan_catalogue(manifest: Manifest) -> Catalogue:
    """Return where every record of a resident store goes: dense weights, then the experts, in the manifest's order."""
    return _plan_sealed(manifest, manifest.experts)


def plan_tiered_catalogue(manifest: Manifest, pinned: Collection[ExpertKey], n_slots: int) -> Catalogue:
    """Return where the dense weights and pinned experts of a store go, and its slots, for whatever is not pinned."""
    sealed = {key: record for key, record in manifest.experts.items() if key in pinned}
    return with_slots(_plan_sealed(manifest, sealed), n_slots)


def with_slots(catalogue: Catalogue, n_slots: int) -> Catalogue:
    """Return the sealed part of a catalogue with so many slots behind it, for whatever expert is not in that part."""
    records = catalogue.manifest.experts.items()
    slot_nbytes = max(record.nbytes for key, record in records if key not in catalogue.experts)
    slots = plan_slot_area(slot_nbytes, n_slots, catalogue.n_sealed)
    sealed_nbytes = catalogue.segments_nbytes[: catalogue.n_sealed]
    sizes = (*sealed_nbytes, *slots.segments_nbytes(), slots.table_nbytes)
    return replace(catalogue, segments_nbytes=sizes, slots=slots)


def _plan_sealed(manifest: Manifest, experts: dict[ExpertKey, Record]) -> Catalogue:
    dense_places = plan_segments([record.nbytes for record in manifest.dense.values()])
    first = dense_places[-1][0] + 1 if dense_places else 0
    expert_places = [
        (first + segment, offset) for segment, offset in plan_segments([record.nbytes for record in experts.values()])
    ]
    sizes: dict[int, int] = {}
    records: list[Record] = [*manifest.dense.values(), *experts.values()]
    for record, (segment, offset) in zip(records, [*dense_places, *expert_places], strict=True):
        sizes[segment] = offset + record.nbytes
    return Catalogue(
        manifest=manifest,
        segments_nbytes=tuple(sizes[segment] for segment in range(len(sizes))),
        experts={
            key: ExpertHandle(key, segment, offset, record.nbytes, 0)
            for (key, record), (segment, offset) in zip(experts.items(), expert_places, strict=True)
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
            None if catalogue.slots is None else list(astuple(catalogue.slots)),
            [[*h.key, h.segment, h.offset, h.nbytes, h.generation] for h in catalogue.experts.values()],
            [[h.name, h.segment, h.offset, h.nbytes] for h in catalogue.dense.values()],
        ]
    )


def decode_catalogue(data: bytes) -> Catalogue:
    """Return the catalogue in those bytes; raise SegmentError, MalformedMessage or ManifestError."""
    plain = unpack(data, nbytes_max=CATALOGUE_NBYTES_MAX)
    if not isinstance(plain, list) or len(plain) != 5 or not isinstance(plain[0], bytes):
        raise SegmentError("the catalogue is no list of manifest, segments, slots, experts and dense weights")
    manifest = load_manifest(plain[0])
    sizes = tuple(_numbers("segments", plain[1]))
    slots = None if plain[2] is None else _slot_area(plain[2], sizes)
    sealed_sizes = sizes if slots is None else sizes[: slots.first_segment]
    experts = {}
    for item in _rows("experts", plain[3], 6):
        layer, expert, segment, offset, nbytes, generation = _numbers("an expert's handle", item)
        handle = ExpertHandle(ExpertKey(layer, expert), segment, offset, nbytes, generation)
        _check_place(str(handle.key), sealed_sizes, handle, manifest.experts.get(handle.key))
        experts[handle.key] = handle
    dense = {}
    for name, *place in _rows("dense", plain[4], 4):
        segment, offset, nbytes = _numbers("a dense handle", place)
        dense_handle = DenseHandle(str(name), segment, offset, nbytes)
        _check_place(dense_handle.name, sealed_sizes, dense_handle, manifest.dense.get(dense_handle.name))
        dense[dense_handle.name] = dense_handle
    if dense.keys() != manifest.dense.keys():
        raise SegmentError("the catalogue does not place every dense tensor of the manifest")
    return Catalogue(manifest, sizes, experts, dense, slots)


def _slot_area(value: object, sizes: tuple[int, ...]) -> SlotArea:
    """Return the slots, if they are what the segments' sizes say."""
    numbers = _numbers("slots", value)
    if len(numbers) != 5 or not all(numbers[:3]) or numbers[1] > SLOTS_MAX:
        raise SegmentError(f"the catalogue's slots: five numbers, at most {SLOTS_MAX} slots, were expected")
    area = SlotArea(*numbers)
    is_last = area.first_segment + area.n_segments == area.table_segment == len(sizes) - 1
    if not is_last or sizes[area.first_segment :] != (*area.segments_nbytes(), area.table_nbytes):
        raise SegmentError("the catalogue's slots and its segments disagree")
    return area


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
