"""The slots of a store that is larger than its memory, as one session has mapped them. Knows no messages' meaning."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from protocol.errors import SegmentError
from protocol.handles import ExpertHandle, ExpertKey
from protocol.slot_table import SlotArea, SlotTable
from runner.errors import StoreChanged

if TYPE_CHECKING:
    from runner.requests import Requests


class AttachedSlots:
    """HostSlots over mapped segments. Closing it ends the requests; the mapping goes with the last who looks at it."""

    def __init__(
        self,
        area: SlotArea,
        views: Sequence[memoryview],
        keys: Collection[ExpertKey],
        requests: "Requests",
        *,
        renew: "Callable[[], AttachedSlots]",
    ) -> None:
        """`renew` attaches anew; it raises StoreUnavailable."""
        self._area = area
        self._renew = renew
        self._views = views
        self.keys = keys
        self.n_slots = area.n_slots
        self.table = SlotTable(views[area.table_segment], area.n_slots)
        self.requests = requests

    def slot(self, slot: int) -> memoryview:
        """Return the bytes of a slot, which the daemon writes."""
        segment, offset = self._area.place(slot)
        return self._views[segment][offset : offset + self._area.slot_nbytes]

    def slot_of(self, handle: ExpertHandle) -> int:
        """Return the slot that a handle names; raise StoreChanged if there is none."""
        try:
            return self._area.slot_of(handle)
        except SegmentError as error:
            raise StoreChanged(f"expertd granted what is not there: {error}") from None

    def renewed(self) -> "AttachedSlots":
        """Return the slots of a new session in place of one that is gone; raise StoreUnavailable."""
        self.close()
        self._views = ()  # whoever is allotted new slots must not find the memory of the old ones taken
        return self._renew()

    def close(self) -> None:
        """End the requests; calling it again does nothing."""
        self.requests.close()
