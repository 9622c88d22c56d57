"""Which slot holds which expert: the table that the daemon writes and runners read without a message.

A slot is memory for one record, filled again and again. Its entry in the table is two words, little endian: a
generation (0: never filled; odd: being written; even: holds the expert named beside it) and the expert's key. The
daemon makes the generation odd before the first byte changes, and even, one higher, when the last one is there and
checked; then it rings the bell behind the last entry, for those who wait for an expert.

Nothing is locked: whoever computes from a slot looks at the entry before, and again after; if it is not the same, what
was computed is thrown away. The second look is the one that counts, so it compares generation and key.
"""

from dataclasses import dataclass

from protocol.bell import Bell, BellRinger
from protocol.errors import SegmentError
from protocol.handles import ExpertHandle, ExpertKey
from protocol.layout import SEGMENT_NBYTES_MAX
from protocol.slot_area import BELL_NBYTES, SLOT_ENTRY_NBYTES, slot_table_nbytes

SLOTS_MAX = 1 << 20
_WORDS_PER_ENTRY = 2
_EXPERT_SHIFT = 32
_LAYER_MASK = (1 << _EXPERT_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class SlotArea:
    """Where the slots of a store lie: whole ones in consecutive segments, and the segment of their table."""

    slot_nbytes: int
    n_slots: int
    slots_per_segment: int
    first_segment: int
    table_segment: int

    @property
    def n_segments(self) -> int:
        """How many segments the slots fill."""
        return -(-self.n_slots // self.slots_per_segment)

    @property
    def table_nbytes(self) -> int:
        """The size of the table's segment."""
        return slot_table_nbytes(self.n_slots)

    def segments_nbytes(self) -> list[int]:
        """Return the sizes of the slots' segments."""
        full, rest = divmod(self.n_slots, self.slots_per_segment)
        sizes = [self.slots_per_segment * self.slot_nbytes] * full
        return [*sizes, rest * self.slot_nbytes] if rest else sizes

    def place(self, slot: int) -> tuple[int, int]:
        """Return the segment of a slot and its offset there."""
        segment, index = divmod(slot, self.slots_per_segment)
        return self.first_segment + segment, index * self.slot_nbytes

    def slot_of(self, handle: ExpertHandle) -> int:
        """Return the slot of a handle; raise SegmentError if it names none, or more bytes than a slot has."""
        index, misplaced = divmod(handle.offset, self.slot_nbytes)
        slot = (handle.segment - self.first_segment) * self.slots_per_segment + index
        is_inside = index < self.slots_per_segment and 0 <= slot < self.n_slots
        if misplaced or not is_inside or handle.nbytes > self.slot_nbytes:
            raise SegmentError(f"{handle.key}: its handle names no slot")
        return slot


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """What a slot held when the table was read."""

    slot: int
    generation: int


def plan_slot_area(slot_nbytes: int, n_slots: int, first_segment: int) -> SlotArea:
    """Return the area of so many slots whose segments come next in a store."""
    slots_per_segment = max(1, SEGMENT_NBYTES_MAX // slot_nbytes)
    n_segments = -(-n_slots // slots_per_segment)
    return SlotArea(slot_nbytes, n_slots, slots_per_segment, first_segment, first_segment + n_segments)


class SlotTable:
    """A client's look at the table. Knows nothing of the slots' bytes."""

    def __init__(self, view: memoryview, n_slots: int) -> None:
        self._words = view[: n_slots * SLOT_ENTRY_NBYTES].cast("Q")
        self._keys = self._words[1::_WORDS_PER_ENTRY]
        self.bell = Bell(_bell(view, n_slots))

    def find(self, key: ExpertKey) -> SlotEntry | None:
        """Return which slot holds an expert just now, None if none does."""
        keys, word = self._keys.tolist(), _word(key)
        slot = -1
        for _ in range(keys.count(word)):
            slot = keys.index(word, slot + 1)
            entry = SlotEntry(slot, self._words[slot * _WORDS_PER_ENTRY])
            if entry.generation and not entry.generation & 1 and self.still_holds(key, entry):
                return entry
        return None

    def present(self) -> dict[ExpertKey, SlotEntry]:
        """Return what all slots hold just now."""
        words = self._words.tolist()
        return {
            ExpertKey(word & _LAYER_MASK, word >> _EXPERT_SHIFT): SlotEntry(slot, generation)
            for slot, (generation, word) in enumerate(zip(words[::2], words[1::2], strict=True))
            if generation and not generation & 1
        }

    def still_holds(self, key: ExpertKey, entry: SlotEntry) -> bool:
        """Whether the slot has held that expert without a break since the entry was read."""
        index = entry.slot * _WORDS_PER_ENTRY
        return self._words[index] == entry.generation and self._words[index + 1] == _word(key)


class SlotTableWriter:
    """The daemon's side of the table. Several threads may write, each to another slot."""

    def __init__(self, view: memoryview, n_slots: int) -> None:
        self._words = view[: n_slots * SLOT_ENTRY_NBYTES].cast("Q")
        self._bell = BellRinger(_bell(view, n_slots))

    def generation(self, slot: int) -> int:
        """Return the generation of a slot."""
        return self._words[slot * _WORDS_PER_ENTRY]

    def begin(self, slot: int) -> None:
        """Say that a slot is about to be written; beginning again goes on with the same generation."""
        self._words[slot * _WORDS_PER_ENTRY] |= 1

    def publish(self, slot: int, key: ExpertKey) -> int:
        """Say that a slot holds that expert, whole and checked, and wake who waits; return its generation."""
        index = slot * _WORDS_PER_ENTRY
        self._words[index + 1] = _word(key)
        self._words[index] += 1
        self._bell.ring()
        return self._words[index]

    def release(self) -> None:
        """Let go of the memory, before it is unmapped."""
        self._words.release()
        self._bell.release()


def _bell(view: memoryview, n_slots: int) -> memoryview:
    start = n_slots * SLOT_ENTRY_NBYTES
    return view[start : start + BELL_NBYTES]


def _word(key: ExpertKey) -> int:
    return key.layer | key.expert << _EXPERT_SHIFT
