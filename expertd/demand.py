"""What the sessions of one store wait for and foresee, and whose turn it is. Knows neither slots nor clocks.

An expert that is waited for is in three places: in the requests that end with it, in `awaiting`, and, until reading
begins, in its sessions' `wanted`. A foreseen one is in `hints`, by session, until it is read, waited for or too late.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from expertd.slot_pool import Hint, HintCounters
from protocol.handles import ExpertKey

REQUESTS_MAX = 16
HINTS_MAX = 64


@dataclass(slots=True, eq=False)
class SessionDemand:
    """One session's requests, hints and counters."""

    session: int
    seen_at: float
    requests: OrderedDict[int, set[ExpertKey]] = field(default_factory=OrderedDict)
    wanted: OrderedDict[ExpertKey, None] = field(default_factory=OrderedDict)
    hints: OrderedDict[ExpertKey, float] = field(default_factory=OrderedDict)  # deadlines
    n_reading: int = 0  # slots that are being filled because of it
    n_hits: int = 0
    n_misses: int = 0
    read_nbytes: int = 0
    hint_counters: HintCounters = field(default_factory=HintCounters)
    # Which turn was its last: whoever had none for longest is next.
    turn: int = 0
    hint_turn: int = 0
    n_awaiting: int = 0
    _waiting_since: float = 0.0
    _waited_s: float = 0.0

    def waited_s(self, now: float) -> float:
        """Return for how long the session has waited for at least one expert."""
        return self._waited_s + (max(0.0, now - self._waiting_since) if self.n_awaiting else 0.0)

    def change_awaiting(self, by: int, now: float) -> None:
        """Count experts that are waited for, or no longer."""
        if not self.n_awaiting:
            self._waiting_since = now
        self.n_awaiting += by
        if not self.n_awaiting:
            self._waited_s += max(0.0, now - self._waiting_since)

    def drop_hints(self, keys: Iterable[ExpertKey]) -> None:
        """Forget hints that nobody will act on."""
        for key in list(keys):
            del self.hints[key]
            self.hint_counters.n_dropped += 1


class DemandTable:
    """All sessions' demand and hints."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[int, SessionDemand] = OrderedDict()
        self._wanting: dict[int, SessionDemand] = {}
        self._hinting: dict[int, SessionDemand] = {}
        self._n_turns = 0
        self.awaiting: dict[ExpertKey, dict[int, SessionDemand]] = {}

    def __iter__(self) -> Iterator[SessionDemand]:
        return iter(self._sessions.values())

    def seen(self, session: int, now: float) -> SessionDemand:
        """Return a session that has just been heard of, for the first time or again."""
        demand = self._sessions.get(session)
        if demand is None:
            demand = self._sessions[session] = SessionDemand(session, now)
        demand.seen_at = now
        return demand

    def find(self, session: int) -> SessionDemand | None:
        """Return a session that has been heard of."""
        return self._sessions.get(session)

    # --- what is waited for ---------------------------------------------------------------------------------------

    @property
    def is_wanting(self) -> bool:
        """Whether an expert is waited for whose reading has not begun."""
        return bool(self._wanting)

    def wanting(self) -> list[SessionDemand]:
        """Return the sessions that want something to be read, in the order of their turns."""
        return sorted(self._wanting.values(), key=lambda demand: demand.turn)

    def await_keys(
        self, demand: SessionDemand, request_id: int, keys: Iterable[ExpertKey], now: float
    ) -> list[ExpertKey]:
        """Note a request for absent experts; return those of them that this session did not wait for yet."""
        pending = set(keys)
        self.forget_request(demand, request_id, now, keeping=pending)
        demand.requests[request_id] = pending
        if len(demand.requests) > REQUESTS_MAX:
            self.forget_request(demand, next(iter(demand.requests)), now)
        new = [key for key in keys if demand.session not in self.awaiting.get(key, {})]
        for key in new:
            self.awaiting.setdefault(key, {})[demand.session] = demand
        demand.change_awaiting(len(new), now)
        return new

    def want(self, demand: SessionDemand, key: ExpertKey) -> None:
        """Have an expert read in the session's turn."""
        demand.wanted[key] = None
        self._wanting[demand.session] = demand

    def begin(self, key: ExpertKey, taker: SessionDemand) -> None:
        """Note that an expert is being read, in that session's turn."""
        for demand in self.awaiting[key].values():
            self._no_longer_wanted(demand, key)
        self._n_turns += 1
        taker.turn = self._n_turns

    def end(self, key: ExpertKey, now: float) -> list[tuple[SessionDemand, int, int]]:
        """Note that nobody waits for an expert any more; return session, request and what that still awaits."""
        ended = []
        for demand in self.awaiting.pop(key, {}).values():
            self._no_longer_wanted(demand, key)
            demand.change_awaiting(-1, now)
            for request_id, pending in list(demand.requests.items()):
                if key in pending:
                    pending.discard(key)
                    ended.append((demand, request_id, len(pending)))
                    if not pending:
                        del demand.requests[request_id]
        return ended

    def withdraw(self, demand: SessionDemand, key: ExpertKey, now: float) -> bool:
        """Note that one session does not wait for an expert any more; return whether it did."""
        waiting = self.awaiting.get(key, {})
        if waiting.pop(demand.session, None) is None:
            return False
        if not waiting:
            del self.awaiting[key]
        self._no_longer_wanted(demand, key)
        demand.change_awaiting(-1, now)
        for request_id, pending in list(demand.requests.items()):
            pending.discard(key)
            if not pending:
                del demand.requests[request_id]
        return True

    def forget_request(
        self, demand: SessionDemand, request_id: int, now: float, keeping: Iterable[ExpertKey] = ()
    ) -> None:
        """Forget a request, and what no other request of the session awaits."""
        if request_id not in demand.requests:
            return
        for key in demand.requests.pop(request_id) - set(keeping):
            if not any(key in pending for pending in demand.requests.values()):
                self.withdraw(demand, key, now)

    def _no_longer_wanted(self, demand: SessionDemand, key: ExpertKey) -> None:
        demand.wanted.pop(key, None)
        if not demand.wanted:
            self._wanting.pop(demand.session, None)

    # --- what is foreseen -----------------------------------------------------------------------------------------

    @property
    def is_hinting(self) -> bool:
        """Whether an expert is foreseen whose reading has not begun."""
        return bool(self._hinting)

    def hint(self, demand: SessionDemand, keys: Iterable[ExpertKey], deadline: float) -> None:
        """Replace a session's hints by these, at most HINTS_MAX of them."""
        keys = list(dict.fromkeys(keys))
        hints = OrderedDict((key, deadline) for key in keys[:HINTS_MAX])
        demand.hint_counters.n_dropped += len((demand.hints.keys() | set(keys)) - hints.keys())
        demand.hints = hints
        if demand.hints:
            self._hinting[demand.session] = demand
        else:
            self._hinting.pop(demand.session, None)

    def note_too_late(self, key: ExpertKey) -> None:
        """Note that an expert is waited for whose hints nobody had acted on."""
        for demand in self._hinting.values():
            if key in demand.hints:
                del demand.hints[key]
                demand.hint_counters.n_late += 1

    def next_hint(self, now: float) -> tuple[ExpertKey, Hint] | None:
        """Return what is to be read next of all that is foreseen, by turns; what is too late is dropped."""
        while self._hinting:
            demand = self._next_hinting()
            demand.drop_hints([key for key, deadline in demand.hints.items() if deadline <= now])
            if demand.hints:
                key, deadline = next(iter(demand.hints.items()))
                return key, Hint(demand.hint_counters, deadline)
            del self._hinting[demand.session]
        return None

    def begin_hint(self, key: ExpertKey) -> set[int]:
        """Note that the foreseen expert that was next is being read; return the sessions that foresaw it."""
        self._n_turns += 1
        self._next_hinting().hint_turn = self._n_turns
        foreseeing = {demand.session for demand in self._hinting.values() if key in demand.hints}
        for session in foreseeing:
            del self._hinting[session].hints[key]
        return foreseeing

    def _next_hinting(self) -> SessionDemand:
        return min(self._hinting.values(), key=lambda demand: demand.hint_turn)

    # --- the end --------------------------------------------------------------------------------------------------

    def close(self, session: int, now: float) -> None:
        """Forget a session, what it waits for and what it foresaw."""
        demand = self._sessions.pop(session, None)
        if demand is None:
            return
        for request_id in list(demand.requests):
            self.forget_request(demand, request_id, now)
        demand.drop_hints(demand.hints)
        self._hinting.pop(session, None)
