"""A world around `HostSlots`: a disk that reads what it is told to, sessions, time; and what must hold in it always.

It keeps its own account, from nothing but what goes in and what comes out, and checks every decision against it.
"""

from dataclasses import dataclass, field

from expertd.host_slots import LEASE_TTL_S, STARVED_S, Actions, HostSlots, ReadOutcome
from protocol.handles import ExpertKey

NBYTES = 100


@dataclass
class Request:
    """What a session asked for and has not been told of yet."""

    awaited: set[ExpertKey]
    told: set[ExpertKey] = field(default_factory=set)


class World:
    """One store's slots, and everything that happens to them."""

    def __init__(self, n_slots: int, n_reads_max: int = 2) -> None:
        self.slots = HostSlots(n_slots, n_reads_max)
        self.n_slots = n_slots
        self.now = 0.0
        self.reading: dict[ExpertKey, int] = {}
        self.abandoned: list[ExpertKey] = []
        self.ready: dict[ExpertKey, int] = {}
        self.leases: dict[int, set[ExpertKey]] = {}
        self.requests: dict[tuple[int, int], Request] = {}
        self.seen_at: dict[int, float] = {}
        self.read_ended_at = 0.0
        self.n_reads = 0
        self.read_order: list[ExpertKey] = []
        self._last_id = 0

    def acquire(self, session: int, *keys: ExpertKey) -> int:
        """Ask for experts; return the request's number."""
        self._last_id += 1
        self.seen_at[session] = self.now
        if keys:
            self.requests[session, self._last_id] = Request(set(keys))
        self._carry_out(self.slots.acquire(session, self._last_id, keys, self.now))
        return self._last_id

    def release(self, session: int, *keys: ExpertKey) -> None:
        """Give experts back, and withdraw from waiting for them."""
        self.seen_at[session] = self.now
        self.leases.setdefault(session, set()).difference_update(keys)
        for (asker, request_id), request in list(self.requests.items()):
            if asker == session:
                request.awaited.difference_update(keys)
                if not request.awaited:
                    del self.requests[asker, request_id]
        self._carry_out(self.slots.release(session, keys, self.now))

    def prefetch(self, session: int, *keys: ExpertKey, within_s: float = 1.0) -> None:
        """Give a hint."""
        self.seen_at[session] = self.now
        self._carry_out(self.slots.prefetch(session, keys, self.now + within_s, self.now))

    def finish(self, key: ExpertKey, outcome: ReadOutcome = ReadOutcome.WHOLE) -> None:
        """End one read."""
        slot = self.reading.pop(key)
        self.read_ended_at = self.now
        if outcome is ReadOutcome.WHOLE:
            self.ready[key] = slot
        nbytes = NBYTES if outcome is ReadOutcome.WHOLE else 0
        self._carry_out(self.slots.reads_ended([(key, outcome, nbytes)], self.now))

    def finish_oldest(self, outcome: ReadOutcome = ReadOutcome.WHOLE) -> ExpertKey:
        """End the read that began first."""
        key = next(iter(self.reading))
        self.finish(key, outcome)
        return key

    def close(self, session: int) -> None:
        """End a session."""
        self.leases.pop(session, None)
        for asker, request_id in list(self.requests):
            if asker == session:
                del self.requests[asker, request_id]
        self._carry_out(self.slots.close_session(session, self.now))
        self.seen_at.pop(session, None)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the slots know."""
        self.now += seconds
        self._carry_out(self.slots.tick(self.now))

    def awaited(self, session: int, request_id: int) -> set[ExpertKey]:
        """Return what a request still awaits."""
        request = self.requests.get((session, request_id))
        return request.awaited if request else set()

    def _carry_out(self, actions: Actions) -> None:
        for grant in actions.grants:
            request = self.requests.get((grant.session, grant.request_id))
            for key, slot in grant.granted:
                assert self.ready[key] == slot, f"{key} was granted in a slot that does not hold it"
                self.leases.setdefault(grant.session, set()).add(key)
            told = {key for key, _ in grant.granted} | {key for key, _ in grant.refused}
            assert len(told) == len(grant.granted) + len(grant.refused), "an expert was told of twice"
            if request is None:
                assert not told
                continue
            assert told <= request.awaited, "an expert came that was not asked for, or twice"
            request.awaited -= told
            assert len(request.awaited) == grant.n_awaited
            if not request.awaited:
                del self.requests[grant.session, grant.request_id]
        for key in actions.abandoned:
            assert key in self.reading
            self.abandoned.append(key)
        for read in actions.reads:
            self._begin(read.key, read.slot)
        assert len(self.reading) + len(self.ready) == self.slots.n_used <= self.n_slots

    def _begin(self, key: ExpertKey, slot: int) -> None:
        assert key not in self.reading, f"{key} is read twice"
        assert key not in self.ready, f"{key} is read though it is there"
        assert slot not in self.reading.values(), "a slot is filled with two experts"
        assert 0 <= slot < self.n_slots
        evicted = next((there for there, its_slot in self.ready.items() if its_slot == slot), None)
        if evicted is not None:
            self._check_may_go(evicted)
            del self.ready[evicted]
        self.reading[key] = slot
        self.read_order.append(key)
        self.n_reads += 1

    def _check_may_go(self, key: ExpertKey) -> None:
        holders = [session for session, keys in self.leases.items() if key in keys]
        are_silent = all(self.now - self.seen_at[session] >= LEASE_TTL_S for session in holders)
        is_starved = not self.reading and self.now - self.read_ended_at >= STARVED_S
        assert are_silent or is_starved, f"{key} was evicted though it is leased"
        for session in holders:
            self.leases[session].discard(key)
