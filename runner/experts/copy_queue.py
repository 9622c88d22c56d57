"""Which piece of which expert is copied next. Pure decisions: knows neither bytes nor threads nor the device.

What a call waits for goes before what was prefetched, piece by piece: a prefetch that is under way stops between two
pieces until nothing is waited for. A copy that is cancelled ends at the next piece. Called under the cache's lock.
"""

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes offset … offset + nbytes of the expert that is copied into a slot."""

    slot: int
    offset: int
    nbytes: int
    is_demand: bool
    is_first: bool
    is_last: bool


class Outcome(Enum):
    """What became of a slot with the piece that was just submitted."""

    MORE = auto()
    FILLED = auto()
    CANCELLED = auto()


class CopyQueue:
    """The copies that were asked for and not yet submitted to their end; one slot has one copy at a time.

    With `whole_demands`, what is waited for is one piece: nothing goes before it, and nobody cancels it.
    """

    def __init__(self, piece_nbytes: int, *, whole_demands: bool = False) -> None:
        self._piece_nbytes = piece_nbytes
        self._whole_demands = whole_demands
        # Both in order of arrival: slot → its expert's bytes.
        self._demands: dict[int, int] = {}
        self._prefetches: dict[int, int] = {}
        self._n_copied: dict[int, int] = {}  # slot → bytes submitted
        self._cancelled: int | None = None  # the slot whose piece is being submitted, if nobody wants it any more
        self._present: int | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is asked for."""
        return not self._demands and not self._prefetches

    def add(self, slot: int, nbytes: int, *, is_demand: bool) -> None:
        """Ask for a copy of so many bytes, more than none."""
        (self._demands if is_demand else self._prefetches)[slot] = nbytes
        self._n_copied[slot] = 0

    def promote(self, slot: int) -> None:
        """Note that a call waits for what was prefetched, if it is not copied yet."""
        nbytes = self._prefetches.pop(slot, None)
        if nbytes is not None:
            self._demands[slot] = nbytes

    def cancel(self, slot: int) -> bool:
        """Copy no more of it; return whether that is so now, else `finish` says when it is."""
        if slot == self._present:
            self._cancelled = slot
            return False
        self._forget(slot)
        return True

    def next(self) -> Piece | None:
        """Return the piece to submit next, between `begin` and `finish`; None if nothing is asked for."""
        copies, is_demand = (self._demands, True) if self._demands else (self._prefetches, False)
        if not copies:
            return None
        slot, total = next(iter(copies.items()))
        offset = self._n_copied[slot]
        nbytes = total - offset
        if not (is_demand and self._whole_demands):
            nbytes = min(self._piece_nbytes, nbytes)
        return Piece(slot, offset, nbytes, is_demand=is_demand, is_first=offset == 0, is_last=offset + nbytes == total)

    def begin(self, piece: Piece) -> None:
        """Note that the piece is being submitted."""
        self._present = piece.slot

    def finish(self, piece: Piece) -> Outcome:
        """Note that the piece was submitted; return what that means for its slot."""
        self._present = None
        if self._cancelled == piece.slot:
            self._cancelled = None
            self._forget(piece.slot)
            return Outcome.CANCELLED
        if piece.is_last:
            self._forget(piece.slot)
            return Outcome.FILLED
        self._n_copied[piece.slot] += piece.nbytes
        return Outcome.MORE

    def clear(self) -> None:
        """Forget all copies but the piece that is being submitted."""
        self._demands.clear()
        self._prefetches.clear()

    def _forget(self, slot: int) -> None:
        self._demands.pop(slot, None)
        self._prefetches.pop(slot, None)
        del self._n_copied[slot]
