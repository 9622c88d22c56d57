"""The memory of a store's slots: segments that only this process writes, and the table of what lies where.

Made by the loader, owned by `expertd.tiered.TieredStore`. Whoever holds the service's lock makes a slot's generation
odd; from then on slot and generation are the reader threads', until one of them has made it even, or given up.
"""

from protocol.handles import ExpertHandle, ExpertKey
from protocol.segment import SegmentBuilder
from protocol.slot_table import SlotArea, SlotTableWriter


class SlotMemory:
    """The writable mappings of a store's slots and of their table."""

    def __init__(self, area: SlotArea, builders: list[SegmentBuilder], table: SegmentBuilder) -> None:
        self.area = area
        self._builders = builders
        self._table_builder = table
        self._table = SlotTableWriter(table.view, area.n_slots)
        self._handles: dict[int, ExpertHandle] = {}  # of what lies in slots, each asked for with every request

    def begin(self, slot: int, nbytes: int) -> memoryview:
        """Say that a slot's content is gone; return the memory to write so many bytes of a record to."""
        self._handles.pop(slot, None)
        self._table.begin(slot)
        segment, offset = self.area.place(slot)
        return self._builders[segment - self.area.first_segment].view[offset : offset + nbytes]

    def publish(self, slot: int, key: ExpertKey, nbytes: int) -> None:
        """Say that a slot holds that expert's record of so many bytes, whole and checked."""
        segment, offset = self.area.place(slot)
        self._handles[slot] = ExpertHandle(key, segment, offset, nbytes, self._table.publish(slot, key))

    def handle(self, slot: int) -> ExpertHandle:
        """Return where the expert lies that a slot holds."""
        return self._handles[slot]

    def close(self) -> None:
        """Give up the mappings; clients' own keep the memory. Nobody may be writing into a slot."""
        self._table.release()
        for builder in (*self._builders, self._table_builder):
            builder.close()
