"""Where the experts of a store larger than memory lie now: resident ones for good, others in the slot that says so.

A place is a slot, or, behind the last one, a resident record. What is read from a slot counts only if `is_still_there`
says so afterwards: the daemon may give it to another expert at any time. Knows no messages.
"""

import torch
from torch import Tensor

from protocol.handles import ExpertHandle, ExpertKey
from protocol.slot_table import SlotEntry
from runner.experts.counters import Tally
from runner.store_view import HostSlots, StoreView


class Presence:
    """Finds experts; remembers where each was seen last, so that one that stays is found by a look at its slot."""

    def __init__(self, store: StoreView, slots: HostSlots, tally: Tally) -> None:
        """Keep the slots, and the records of all experts that are in none; raise CorruptExpert."""
        model = store.manifest.model
        self._manifest = store.manifest
        self._slots = slots
        self._table = slots.table
        self.bell = slots.table.bell  # rung when a slot was filled
        self._tally = tally
        self.n_slots = slots.n_slots
        # All that can be computed from, by place.
        self.records: list[Tensor] = [_bytes(slots.slot(slot)) for slot in range(self.n_slots)]
        self._seen: list[list[SlotEntry | None]] = [[None] * model.n_experts for _ in range(model.n_layers)]
        for key in store.manifest.experts:
            if key not in slots.keys:
                self._seen[key.layer][key.expert] = SlotEntry(len(self.records), 0)
                self.records.append(_bytes(store.expert_record(key)))

    def find(self, key: ExpertKey) -> SlotEntry | None:
        """Return where that expert lies now, if anywhere."""
        layer, expert = key
        seen = self._seen[layer][expert]
        if seen is not None:
            if self.is_still_there(key, seen):
                return seen
            self._tally.evictions += 1
        found = self._seen[layer][expert] = self._table.find(key)
        return found

    def granted(self, handle: ExpertHandle) -> SlotEntry:
        """Return the place that the daemon named; raise StoreChanged if it is none."""
        place = SlotEntry(self._slots.slot_of(handle), handle.generation)
        self._seen[handle.key.layer][handle.key.expert] = place
        return place

    def is_still_there(self, key: ExpertKey, place: SlotEntry) -> bool:
        """Return whether that expert has been there without a break since it was found there."""
        return place.slot >= self.n_slots or self._table.still_holds(key, place)

    def nbytes(self, key: ExpertKey) -> int:
        """Return the length of that expert's record."""
        return self._manifest.experts[key].nbytes


def _bytes(view: memoryview) -> Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)
