"""Which experts of a store that is larger than its memory are in memory: decisions, and nothing but decisions.

Requests and finished reads go in, with the time; what is to be read and what is to be answered comes out. Knows neither
sockets, files, threads nor bytes. Its rules:

- One read of an expert, however many sessions wait for it. What is waited for is read before what is foreseen, one
  expert for each session in turn. While several sessions want slots, one that has its share waits for the others.
- A slot that is leased or being read is not evicted. Leases of a session that fell silent can be taken; and when
  experts are waited for, no slot can be had and nothing is being read for STARVED_S, the oldest lease is taken: so
  sessions that hold slots and wait for more can never block each other for good.
- A hint takes no lease. It is read only while fewer reads are under way than keep the disk busy, two at a time, and
  only as long as some session still foresees it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from expertd.demand import DemandTable, SessionDemand
from expertd.slot_pool import Slot, SlotPool
from protocol.handles import ExpertKey

LEASE_TTL_S = 10.0
STARVED_S = 1.0
# One that is being read on a hint, and the next: which one that should be may be known better by then.
_HINT_READS_MAX = 2


class ReadOutcome(StrEnum):
    """What came of reading an expert."""

    WHOLE = "whole"
    CORRUPT = "corrupt"
    FAILED = "failed"
    DROPPED = "dropped"  # nobody foresaw it any more


# Made several times for a request, hence tuples: a frozen record costs several times as much.
class SlotRead(NamedTuple):
    """Read that expert into that slot; one that is awaited goes first."""

    key: ExpertKey
    slot: int
    is_awaited: bool


class Grant(NamedTuple):
    """Tell a session what has come in of its request: experts with their slots, and what cannot be had."""

    session: int
    request_id: int
    granted: tuple[tuple[ExpertKey, int], ...]
    refused: tuple[tuple[ExpertKey, ReadOutcome], ...]
    n_awaited: int


@dataclass(slots=True)
class Actions:
    """What is to be done: reads begun, reads that somebody waits for by now or nobody foresees any more, answers."""

    reads: list[SlotRead] = field(default_factory=list)
    hastened: list[ExpertKey] = field(default_factory=list)
    abandoned: list[ExpertKey] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)

    def grant(self, grant: Grant) -> None:
        """Add an answer; several to one request become one."""
        for index, earlier in enumerate(self.grants):
            if (earlier.session, earlier.request_id) == (grant.session, grant.request_id):
                granted, refused = earlier.granted + grant.granted, earlier.refused + grant.refused
                self.grants[index] = grant._replace(granted=granted, refused=refused)
                return
        self.grants.append(grant)


@dataclass(slots=True)
class _Reading:
    """A read under way, and the session in whose turn it was begun, None for a hint: of whom that is."""

    taker: SessionDemand | None
    foreseen_by: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """One session's counters."""

    n_leases: int = 0
    n_hits: int = 0
    n_misses: int = 0
    n_hints_used: int = 0
    n_hints_late: int = 0
    n_hints_wasted: int = 0
    n_hints_dropped: int = 0
    read_nbytes: int = 0
    waited_s: float = 0.0


class HostSlots:
    """The slots of one store and the sessions that use them. What happens goes in, what is to be done comes out."""

    def __init__(self, n_slots: int, n_reads_max: int) -> None:
        self._pool = SlotPool(n_slots)
        self._demand = DemandTable()
        self._n_reads_max = n_reads_max
        self._reading: dict[ExpertKey, _Reading] = {}
        self._n_awaited_reads = 0
        self._starved_since: float | None = None
        self._now = 0.0
        self.corrupt: set[ExpertKey] = set()
        self.n_loads = 0
        self.read_nbytes = 0

    # --- events ---------------------------------------------------------------------------------------------------

    def acquire(self, session: int, request_id: int, keys: Iterable[ExpertKey], now: float) -> Actions:
        """Lease what is there, and have the rest read."""
        demand = self._seen(session, now)
        actions = Actions()
        granted: list[tuple[ExpertKey, int]] = []
        refused: list[tuple[ExpertKey, ReadOutcome]] = []
        pending: list[ExpertKey] = []
        for key in dict.fromkeys(keys):
            slot = self._pool.find(key)
            if slot is not None and slot.is_ready:
                self._lease_present(demand, key, slot)
                granted.append((key, slot.number))
            elif key in self.corrupt:
                refused.append((key, ReadOutcome.CORRUPT))
            else:
                pending.append(key)
        self._await(demand, request_id, pending, actions)
        if granted or refused or not pending:
            actions.grant(Grant(session, request_id, tuple(granted), tuple(refused), len(pending)))
        self._start_reads(actions)
        return actions

    def release(self, session: int, keys: Iterable[ExpertKey], now: float) -> Actions:
        """Take leases back, and count the experts as used; what is still waited for is no longer."""
        demand = self._seen(session, now)
        for key in keys:
            if self._demand.withdraw(demand, key, now) or self._pool.give_back(key, session):
                continue
            slot = self._pool.find(key)
            if slot is not None:  # or it has been read, which we are about to hear
                self._pool.touch(slot)
                self._count_hit(demand, slot)
        return self._started()

    def prefetch(self, session: int, keys: Iterable[ExpertKey], deadline: float, now: float) -> Actions:
        """Have experts read that may be needed until then; they replace what this session foresaw before."""
        demand = self._seen(session, now)
        foreseen = list(keys)
        absent = [key for key in foreseen if not self._needs_no_hint(key)]
        self._demand.hint(demand, absent, deadline)
        actions = Actions()
        self._foresees_only(session, foreseen, actions)
        self._start_reads(actions)
        return actions

    def seen(self, session: int, now: float) -> None:
        """Note that a session lives."""
        self._seen(session, now)

    def reads_ended(self, ended: Iterable[tuple[ExpertKey, ReadOutcome, int]], now: float) -> Actions:
        """Answer those who waited for those experts; each comes with what became of it and the bytes read."""
        self._now = now
        self._starved_since = None  # something was being read
        actions = Actions()
        for key, outcome, nbytes in ended:
            self._read_ended(key, outcome, nbytes, actions)
        self._start_reads(actions)
        return actions

    def close_session(self, session: int, now: float) -> Actions:
        """Free all that a session held; closing it again does nothing."""
        self._now = now
        for key in self._pool.leased_keys(session):
            self._pool.give_back(key, session)
        self._demand.close(session, now)
        actions = Actions()
        self._foresees_only(session, (), actions)
        self._start_reads(actions)
        return actions

    def tick(self, now: float) -> Actions:
        """Let time pass: hints grow old, leases of silent sessions can be taken."""
        self._now = now
        return self._started()

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def n_used(self) -> int:
        """How many slots hold an expert or are being filled."""
        return self._pool.n_used

    @property
    def n_leases_lost(self) -> int:
        """How many leases were taken from their holders."""
        return self._pool.n_leases_lost

    @property
    def next_tick(self) -> float | None:
        """When `tick` is to be called if nothing happens; None: not until something happens."""
        return None if self._starved_since is None else max(self._now, self._starved_since) + STARVED_S

    def figures(self, session: int, now: float) -> SessionFigures:
        """Return what a session has had."""
        demand = self._demand.find(session)
        if demand is None:
            return SessionFigures()
        hints = demand.hint_counters
        return SessionFigures(
            self._pool.n_leases(session),
            demand.n_hits,
            demand.n_misses,
            hints.n_used,
            hints.n_late,
            hints.n_wasted,
            hints.n_dropped,
            demand.read_nbytes,
            demand.waited_s(now),
        )

    # --- private --------------------------------------------------------------------------------------------------

    def _seen(self, session: int, now: float) -> SessionDemand:
        self._now = now
        return self._demand.seen(session, now)

    def _started(self) -> Actions:
        actions = Actions()
        self._start_reads(actions)
        return actions

    def _lease_present(self, demand: SessionDemand, key: ExpertKey, slot: Slot) -> None:
        if demand.session not in slot.holders:
            self._count_hit(demand, slot)
        self._pool.lease(key, slot, demand.session, self._now)

    def _count_hit(self, demand: SessionDemand, slot: Slot) -> None:
        demand.n_hits += 1
        hint = self._pool.use(slot)
        if hint is not None:
            hint.counters.n_used += 1

    def _await(self, demand: SessionDemand, request_id: int, keys: list[ExpertKey], actions: Actions) -> None:
        if not keys:
            self._demand.forget_request(demand, request_id, self._now)
            return
        for key in self._demand.await_keys(demand, request_id, keys, self._now):
            demand.n_misses += 1
            reading = self._reading.get(key)
            if reading is None:
                self._demand.note_too_late(key)
                self._demand.want(demand, key)
            elif reading.taker is None:
                self._hasten(demand, key, reading, actions)

    def _needs_no_hint(self, key: ExpertKey) -> bool:
        return self._pool.find(key) is not None or key in self._demand.awaiting or key in self.corrupt

    def _hasten(self, demand: SessionDemand, key: ExpertKey, reading: _Reading, actions: Actions) -> None:
        """Somebody waits for what is being read on a hint."""
        reading.taker = demand
        demand.n_reading += 1
        self._n_awaited_reads += 1
        actions.hastened.append(key)
        slot = self._pool.find(key)
        hint = self._pool.use(slot) if slot is not None else None
        if hint is not None:
            hint.counters.n_late += 1

    def _foresees_only(self, session: int, keys: Collection[ExpertKey], actions: Actions) -> None:
        """Note what a session foresees by now of what is being read on hints; what nobody does is given up."""
        for key, reading in self._reading.items():
            if reading.taker is not None:
                continue
            if key in keys:
                reading.foreseen_by.add(session)
            elif session in reading.foreseen_by:
                reading.foreseen_by.discard(session)
                if not reading.foreseen_by:
                    actions.abandoned.append(key)

    def _read_ended(self, key: ExpertKey, outcome: ReadOutcome, nbytes: int, actions: Actions) -> None:
        reading = self._reading.pop(key)
        slot = self._pool.find(key)
        if slot is None:
            raise KeyError(f"{key} was read into no slot")
        if reading.taker is not None:
            self._n_awaited_reads -= 1
            reading.taker.n_reading -= 1
            reading.taker.read_nbytes += nbytes
        self.read_nbytes += nbytes
        if outcome is ReadOutcome.DROPPED:
            self._dropped(key, slot)
            return
        waiting = self._demand.end(key, self._now)
        if outcome is ReadOutcome.WHOLE:
            self.n_loads += 1
            self._pool.fill(slot)
            for demand, _, _ in waiting:
                self._pool.lease(key, slot, demand.session, self._now)
        else:
            self._pool.clear(slot)
            if outcome is ReadOutcome.CORRUPT:
                self.corrupt.add(key)
        granted = ((key, slot.number),) if outcome is ReadOutcome.WHOLE else ()
        refused = () if outcome is ReadOutcome.WHOLE else ((key, outcome),)
        for demand, request_id, n_awaited in waiting:
            actions.grant(Grant(demand.session, request_id, granted, refused, n_awaited))

    def _dropped(self, key: ExpertKey, slot: Slot) -> None:
        """Nobody foresaw an expert any more; but somebody may wait for it meanwhile."""
        hint = self._pool.use(slot)
        if hint is not None:
            hint.counters.n_dropped += 1
        self._pool.clear(slot)
        for demand in self._demand.awaiting.get(key, {}).values():
            self._demand.want(demand, key)

    def _start_reads(self, actions: Actions) -> None:
        if not self._demand.is_wanting and not self._demand.is_hinting:
            self._starved_since = None
            return
        while self._demand.is_wanting and self._n_awaited_reads < self._n_reads_max:
            if not self._start_awaited(actions):
                return
        self._starved_since = None
        if not self._demand.is_wanting:
            self._start_hints(actions)

    def _start_awaited(self, actions: Actions) -> bool:
        """Begin one read in the turn of the session that is next; return whether there was a slot for it."""
        demand = self._whose_turn()
        key = next(iter(demand.wanted))
        slot = self._pool.take(key, self._now, self._is_silent)
        if slot is None and self._is_starved():
            slot = self._pool.take_oldest_lease(key)
        if slot is None:
            return False
        self._starved_since = None
        self._demand.begin(key, demand)
        self._reading[key] = _Reading(demand)
        self._n_awaited_reads += 1
        demand.n_reading += 1
        actions.reads.append(SlotRead(key, slot.number, is_awaited=True))
        return True

    def _whose_turn(self) -> SessionDemand:
        wanting = self._demand.wanting()
        share = max(1, self._pool.n_slots // max(1, self._n_active()))
        return next((demand for demand in wanting if self._n_held(demand) < share), wanting[0])

    def _n_active(self) -> int:
        return sum(1 for demand in self._demand if demand.wanted or self._n_held(demand))

    def _n_held(self, demand: SessionDemand) -> int:
        return self._pool.n_leases(demand.session) + demand.n_reading

    def _is_silent(self, session: int) -> bool:
        demand = self._demand.find(session)
        return demand is None or self._now - demand.seen_at >= LEASE_TTL_S

    def _is_starved(self) -> bool:
        """Whether nothing has been read for too long though an expert is waited for."""
        if self._reading or self._starved_since is None:
            self._starved_since = self._now
        return self._now - self._starved_since >= STARVED_S

    @property
    def _n_hint_reads(self) -> int:
        return len(self._reading) - self._n_awaited_reads

    def _start_hints(self, actions: Actions) -> None:
        while self._n_hint_reads < _HINT_READS_MAX and len(self._reading) < self._n_reads_max:
            foreseen = self._demand.next_hint(self._now)
            if foreseen is None:
                return
            key, hint = foreseen
            slot = self._pool.take_for_hint(key, hint, self._now)
            if slot is None:
                return
            self._reading[key] = _Reading(None, self._demand.begin_hint(key))
            actions.reads.append(SlotRead(key, slot.number, is_awaited=False))
