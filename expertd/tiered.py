"""A store that is larger than its memory, at work: what `HostSlots` decides is carried out here.

Called under the service's lock, from the request thread and the control thread; never waits. Reader threads say in the
slot table what they have read, so that whoever waits for it goes on at once; then they leave what came of their work in
`_ended` and wake the request thread, which calls `collect`.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertd.host_slots import Actions, Grant, HostSlots, ReadOutcome, SessionFigures
from expertd.read_queue import n_pieces
from expertd.reading import ReadEnd, RecordReader
from expertd.slot_memory import SlotMemory
from expertd.store import StoreFiles
from protocol.catalogue import Catalogue
from protocol.handles import ExpertHandle, ExpertKey
from protocol.messages import Code, Granted, KeyRefusal, Refused
from protocol.schema import REFUSALS_MAX

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TierSettings:
    """How experts are read into slots: threads, and bytes a second at most, None: as fast as the disk can.

    Reader threads call `wake` when there is something to collect, and `on_failure` after a fault of ours.
    """

    n_threads: int
    limit_nbytes_per_s: float | None
    wake: Callable[[], None]
    on_failure: Callable[[], None]


class TieredReply(NamedTuple):
    """An answer to a session, which need not be the one that asked last."""

    session: int
    message: Granted


class TieredStore:
    """The slots, the reader and the decisions of one store. Owns all three."""

    def __init__(
        self,
        catalogue: Catalogue,
        files: StoreFiles,
        memory: SlotMemory,
        corrupt: Collection[ExpertKey],
        settings: TierSettings,
    ) -> None:
        self._catalogue = catalogue
        self._memory = memory
        self._wake = settings.wake
        self._ended: deque[ReadEnd] = deque()
        # Every thread has a piece, and a record is next; more would only stand in the way of whoever comes later.
        n_records_to_be_busy = -(-settings.n_threads // n_pieces(memory.area.slot_nbytes))
        self._slots = HostSlots(memory.area.n_slots, n_reads_max=n_records_to_be_busy + 1)
        self._slots.corrupt.update(corrupt)
        files.open_direct()
        self._reader = RecordReader(
            files,
            settings.n_threads,
            settings.limit_nbytes_per_s,
            on_end=self._on_read_end,
            on_stopped=memory.close,
            on_failure=settings.on_failure,
        )

    # --- requests -------------------------------------------------------------------------------------------------

    def first_unknown(self, keys: Sequence[ExpertKey]) -> ExpertKey | None:
        """Return the first of those experts that the store does not have."""
        for key in keys:
            if key not in self._catalogue.manifest.experts:
                return key
        return None

    def acquire(self, session: int, request_id: int, keys: Sequence[ExpertKey], now: float) -> list[TieredReply]:
        """Lease experts to a session; those that are absent come later."""
        pinned: tuple[ExpertHandle, ...] = ()
        wanted = keys
        if self._catalogue.experts:
            pinned = tuple(self._catalogue.experts[key] for key in keys if key in self._catalogue.experts)
            wanted = [key for key in keys if key not in self._catalogue.experts]
        replies = self._hear(now)  # what can be seen in the table is there
        actions = self._slots.acquire(session, request_id, wanted, now)
        if pinned and not actions.grants:  # all others are still to come
            actions.grants.append(Grant(session, request_id, (), (), len(set(wanted))))
        return replies + self._carry_out(actions, pinned=pinned)

    def release(self, session: int, keys: Sequence[ExpertKey], now: float) -> list[TieredReply]:
        """Take leases back and count experts as used."""
        replies = self._hear(now)
        return replies + self._carry_out(self._slots.release(session, keys, now))

    def prefetch(self, session: int, keys: Sequence[ExpertKey], deadline: float, now: float) -> list[TieredReply]:
        """Take a hint."""
        absent = [key for key in keys if key not in self._catalogue.experts]
        return self._carry_out(self._slots.prefetch(session, absent, deadline, now))

    def seen(self, session: int, now: float) -> None:
        """Note that a session lives."""
        self._slots.seen(session, now)

    def close_session(self, session: int, now: float) -> list[TieredReply]:
        """Free all that a session held."""
        return self._carry_out(self._slots.close_session(session, now))

    def collect(self, now: float) -> list[TieredReply]:
        """Answer those who waited for what was read meanwhile, and let time pass."""
        if not self._ended:
            return self._carry_out(self._slots.tick(now)) if self._is_due(now) else []
        return self._hear(now)

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> HostSlots:
        """The decisions, for their counters."""
        return self._slots

    @property
    def n_slots(self) -> int:
        """How many slots there are."""
        return self._memory.area.n_slots

    @property
    def slot_nbytes(self) -> int:
        """The size of a slot."""
        return self._memory.area.slot_nbytes

    def figures(self, session: int, now: float) -> SessionFigures:
        """Return what a session has had."""
        return self._slots.figures(session, now)

    # --- the end --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Read nothing more; files and memory go when the last read has ended."""
        self._reader.stop()

    def join(self, timeout_s: float) -> None:
        """Wait for that."""
        self._reader.join(timeout_s)

    # --- private --------------------------------------------------------------------------------------------------

    def _on_read_end(self, end: ReadEnd) -> None:
        """Called in a reader thread, or where a read is given up."""
        if end.outcome is ReadOutcome.WHOLE:
            self._memory.publish(end.slot, end.key, self._catalogue.manifest.experts[end.key].nbytes)
        self._ended.append(end)
        self._wake()

    def _hear(self, now: float) -> list[TieredReply]:
        """Do what follows from the reads that have ended."""
        if not self._ended:
            return []
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return self._carry_out(self._slots.reads_ended([(end.key, end.outcome, end.nbytes) for end in ended], now))

    def _is_due(self, now: float) -> bool:
        return self._slots.next_tick is not None and self._slots.next_tick <= now

    def _carry_out(self, actions: Actions, pinned: tuple[ExpertHandle, ...] = ()) -> list[TieredReply]:
        # Answers first: a slot that is given away in the same breath has another generation afterwards.
        replies = [reply for grant in actions.grants for reply in self._replies(grant, pinned)]
        for read in actions.reads:
            record = self._catalogue.manifest.experts[read.key]
            target = self._memory.begin(read.slot, record.nbytes)
            self._reader.read(read.key, record, read.slot, target, is_awaited=read.is_awaited)
        for key in actions.hastened:
            self._reader.hasten(key)
        for key in actions.abandoned:
            self._reader.abandon(key)
        return replies

    def _replies(self, grant: Grant, pinned: tuple[ExpertHandle, ...]) -> list[TieredReply]:
        handles = pinned + tuple([self._memory.handle(slot) for _, slot in grant.granted])
        if not grant.refused:
            return [TieredReply(grant.session, Granted(grant.request_id, handles, (), grant.n_awaited))]
        refusals = tuple(KeyRefusal(key, _REASONS[outcome]) for key, outcome in grant.refused)
        replies = []
        while len(refusals) > REFUSALS_MAX:
            refusals, now = refusals[REFUSALS_MAX:], refusals[:REFUSALS_MAX]
            n_awaited = grant.n_awaited + len(handles) + len(refusals)
            replies.append(TieredReply(grant.session, Granted(grant.request_id, (), now, n_awaited)))
        replies.append(TieredReply(grant.session, Granted(grant.request_id, handles, refusals, grant.n_awaited)))
        return replies


_REASONS = {
    ReadOutcome.CORRUPT: Refused(Code.CORRUPT, "its bytes do not match their checksum"),
    ReadOutcome.FAILED: Refused(Code.READ_FAILED, "its bytes could not be read; the daemon's log has the reason"),
}
