"""What happens a second, from two statuses of one daemon. Pure; the daemon's own clock says how far they are apart."""

from dataclasses import dataclass

from protocol.messages import SessionStatus, Status, StoreStatus

# Two sessions of one process are told apart by when they began.
_SAME_BEGIN_S = 1e-3


@dataclass(frozen=True, slots=True)
class StoreRates:
    """Of one store, a second."""

    loads: float
    read_nbytes: float


@dataclass(frozen=True, slots=True)
class SessionRates:
    """Of one session, a second; `waited` is the share of the time in which it waited for an expert."""

    hits: float
    misses: float
    read_nbytes: float
    waited: float


class Rates:
    """The difference of two statuses. What is in the later one only, or went backwards, has no rates."""

    def __init__(self, before: Status | None, after: Status) -> None:
        is_same_daemon = before is not None and before.pid == after.pid
        self._before = before if is_same_daemon else None
        self._after = after
        self._elapsed_s = after.age_s - before.age_s if before is not None else 0.0

    def of_store(self, store: StoreStatus) -> StoreRates | None:
        """Return a store's rates, None if they are not known yet."""
        if self._before is None or self._elapsed_s <= 0:
            return None
        former = next((s for s in self._before.stores if s.digest == store.digest and s.n_loads <= store.n_loads), None)
        if former is None:
            return None
        return StoreRates(
            (store.n_loads - former.n_loads) / self._elapsed_s,
            max(0, store.read_nbytes - former.read_nbytes) / self._elapsed_s,
        )

    def of_session(self, session: SessionStatus) -> SessionRates | None:
        """Return a session's rates, None if they are not known yet."""
        former = self._former(session)
        if former is None or self._elapsed_s <= 0 or former.n_hits > session.n_hits:
            return None
        return SessionRates(
            (session.n_hits - former.n_hits) / self._elapsed_s,
            max(0, session.n_misses - former.n_misses) / self._elapsed_s,
            max(0, session.read_nbytes - former.read_nbytes) / self._elapsed_s,
            max(0.0, session.waited_s - former.waited_s) / self._elapsed_s,
        )

    def _former(self, session: SessionStatus) -> SessionStatus | None:
        if self._before is None:
            return None
        began_at = self._after.age_s - session.age_s
        for former in self._before.sessions:
            former_began_at = self._before.age_s - former.age_s
            is_same = former.pid == session.pid and former.digest == session.digest
            if is_same and abs(former_began_at - began_at) < _SAME_BEGIN_S:
                return former
        return None
