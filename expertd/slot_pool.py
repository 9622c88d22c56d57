"""Which expert lies in which slot, who leases it, and which slot is given up next. Knows neither sockets nor clocks.

A slot is empty, being read (it has a key), or ready. A ready slot that nobody leases can be evicted: first one that was
read on a hint whose time is over, then as `expertd.eviction` says. A leased slot is taken only from sessions that fell
silent, or as the last way out (`take_oldest_lease`); its reader notices by the slot's new generation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from expertd.eviction import EvictionOrder
from protocol.handles import ExpertKey


@dataclass(slots=True)
class HintCounters:
    """What became of the hints of one session."""

    n_used: int = 0
    n_late: int = 0
    n_wasted: int = 0
    n_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Hint:
    """Why an unused expert lies in a slot: somebody foresaw it, until then."""

    counters: HintCounters
    deadline: float


@dataclass(slots=True, eq=False)
class Slot:
    """One slot; `holders` are the sessions that lease it, each with the time of its grant."""

    number: int
    key: ExpertKey | None = None
    is_ready: bool = False
    holders: dict[int, float] = field(default_factory=dict)
    hint: Hint | None = None


class SlotPool:
    """All slots of one store."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        # A guess is often wrong: what is read on hints and not used yet may fill so many slots.
        self._n_hinted_max = max(1, n_slots // 4)
        self._empty = [Slot(number) for number in reversed(range(n_slots))]
        self._by_key: dict[ExpertKey, Slot] = {}
        self._order = EvictionOrder()  # ready and not leased
        self._hinted: dict[int, Slot] = {}  # being read or ready, on a hint, and not used yet
        self._leased_by: dict[int, dict[ExpertKey, Slot]] = {}  # by session
        self.n_leases_lost = 0

    @property
    def n_used(self) -> int:
        """How many slots hold an expert or are about to."""
        return len(self._by_key)

    def find(self, key: ExpertKey) -> Slot | None:
        """Return the slot that holds an expert or is being filled with it."""
        return self._by_key.get(key)

    def take(self, key: ExpertKey, now: float, is_silent: Callable[[int], bool]) -> Slot | None:
        """Return a slot in which an expert that is waited for can be read; None if all are leased or being read."""
        slot = self._empty.pop() if self._empty else self._outdated(now) or self._evicted_for(key, is_hint=False)
        return self._given(slot or self._abandoned(is_silent), key)

    def take_for_hint(self, key: ExpertKey, hint: Hint, now: float) -> Slot | None:
        """Return a slot for an expert that was foreseen; None if hints have taken their share."""
        slot = self._outdated(now)
        if slot is None and len(self._hinted) < self._n_hinted_max:
            slot = self._empty.pop() if self._empty else self._evicted_for(key, is_hint=True)
        slot = self._given(slot, key)
        if slot is not None:
            slot.hint = hint
            self._hinted[slot.number] = slot
        return slot

    def take_oldest_lease(self, key: ExpertKey) -> Slot | None:
        """Return the slot that was leased longest ago, whoever holds it; None if none is leased."""
        leased = [slot for slot in self._by_key.values() if slot.holders]
        return self._given(min(leased, key=_leased_at, default=None), key)

    def fill(self, slot: Slot) -> None:
        """Note that a slot holds its expert."""
        slot.is_ready = True
        if slot.key is not None:
            self._order.offer(slot.key)

    def clear(self, slot: Slot) -> None:
        """Note that a slot could not be filled."""
        self.use(slot)
        self._forget(slot)
        self._empty.append(slot)

    def n_leases(self, session: int) -> int:
        """Return how many slots a session leases."""
        return len(self._leased_by.get(session, ()))

    def leased_keys(self, session: int) -> list[ExpertKey]:
        """Return the experts a session leases."""
        return list(self._leased_by.get(session, ()))

    def lease(self, key: ExpertKey, slot: Slot, session: int, now: float) -> None:
        """Have a session lease the ready slot of an expert, from now on."""
        if not slot.holders:
            self._order.keep(key)
        slot.holders[session] = now
        leased = self._leased_by.get(session)
        if leased is None:
            leased = self._leased_by[session] = {}
        leased[key] = slot

    def give_back(self, key: ExpertKey, session: int) -> bool:
        """End a session's lease, the slot counting as used just now; return whether there was one."""
        slot = self._leased_by.get(session, {}).pop(key, None)
        if slot is None:
            return False
        if not self._leased_by[session]:
            del self._leased_by[session]
        del slot.holders[session]
        if not slot.holders:
            self._order.offer(key)
        return True

    def touch(self, slot: Slot) -> None:
        """Count a ready slot as used just now."""
        if slot.key is not None:
            self._order.touch(slot.key)

    def use(self, slot: Slot) -> Hint | None:
        """Return the hint on which a slot was filled, if this is the first use of it."""
        hint = slot.hint
        if hint is not None:
            slot.hint = None
            del self._hinted[slot.number]
        return hint

    def _outdated(self, now: float) -> Slot | None:
        for slot in self._hinted.values():
            if slot.is_ready and slot.hint is not None and slot.hint.deadline <= now:
                return slot
        return None

    def _evicted_for(self, key: ExpertKey, *, is_hint: bool) -> Slot | None:
        victim = self._order.victim(key, is_hint=is_hint)
        return None if victim is None else self._by_key[victim]

    def _abandoned(self, is_silent: Callable[[int], bool]) -> Slot | None:
        for slot in self._by_key.values():
            if slot.holders and all(is_silent(session) for session in slot.holders):
                return slot
        return None

    def _given(self, slot: Slot | None, key: ExpertKey) -> Slot | None:
        """Hand a slot over to an expert, evicting what is in it."""
        if slot is None:
            return None
        hint = self.use(slot)
        if hint is not None:
            hint.counters.n_wasted += 1
        self._forget(slot)
        slot.key = key
        self._by_key[key] = slot
        self._order.hold(key)
        return slot

    def _forget(self, slot: Slot) -> None:
        if slot.key is None:
            return
        self.n_leases_lost += len(slot.holders)
        for session in list(slot.holders):
            self.give_back(slot.key, session)
        del self._by_key[slot.key]
        self._order.let_go(slot.key)
        slot.key, slot.is_ready = None, False


def _leased_at(slot: Slot) -> float:
    """When the last of its holders was granted a slot."""
    return max(slot.holders.values())
