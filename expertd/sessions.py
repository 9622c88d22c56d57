"""Who is connected: one session per open control connection. Knows neither sockets nor clocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from expertd.host_slots import SessionFigures
from expertd.stores import HeldStore
from protocol.fdpass import Credentials
from protocol.messages import SessionStatus, Stats


@dataclass(slots=True, eq=False)
class Session:
    """One client, from hello to the end of its connection."""

    session_id: int
    peer: Credentials
    opened_at: float
    token: bytes | None = None  # None until hello
    library_version: str = ""
    store: HeldStore | None = None
    n_bad_messages: int = 0
    n_requests: int = 0
    n_refused: int = 0
    routing_id: bytes = b""  # where its answers go, from its last request; the request thread's

    def figures(self, now: float) -> SessionFigures:
        """Return what it has had of slots."""
        tiered = self.store.tiered if self.store else None
        return tiered.figures(self.session_id, now) if tiered else SessionFigures()

    def status(self, now: float) -> SessionStatus:
        """Return what `status` shows of this session."""
        figures = self.figures(now)
        return SessionStatus(
            pid=self.peer.pid,
            library_version=self.library_version,
            age_s=max(0.0, now - self.opened_at),
            digest=self.store.digest if self.store else None,
            n_leases=figures.n_leases,
            n_hits=figures.n_hits,
            n_misses=figures.n_misses,
            read_nbytes=figures.read_nbytes,
            waited_s=figures.waited_s,
        )

    def stats(self, request_id: int, now: float) -> Stats:
        """Return what this session is told of itself."""
        figures = self.figures(now)
        return Stats(
            request_id=request_id,
            age_s=max(0.0, now - self.opened_at),
            n_requests=self.n_requests,
            n_refused=self.n_refused,
            n_leases=figures.n_leases,
            n_hits=figures.n_hits,
            n_misses=figures.n_misses,
            n_prefetch_used=figures.n_hints_used,
            n_prefetch_late=figures.n_hints_late,
            n_prefetch_wasted=figures.n_hints_wasted,
            n_prefetch_dropped=figures.n_hints_dropped,
            read_nbytes=figures.read_nbytes,
            waited_s=figures.waited_s,
        )


@dataclass(slots=True)
class SessionTable:
    """All sessions, by id and by token."""

    _by_id: dict[int, Session] = field(default_factory=dict)
    _by_token: dict[bytes, Session] = field(default_factory=dict)
    _next_id: int = 1

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._by_id.values())

    def open(self, peer: Credentials, now: float) -> Session:
        """Return a new session."""
        session = Session(self._next_id, peer, now)
        self._next_id += 1
        self._by_id[session.session_id] = session
        return session

    def is_open(self, session: Session) -> bool:
        """Whether that session still goes on."""
        return self._by_id.get(session.session_id) is session

    def welcome(self, session: Session, token: bytes, library_version: str) -> None:
        """Give a session its token."""
        session.token = token
        session.library_version = library_version
        self._by_token[token] = session

    def find(self, session_id: int) -> Session | None:
        """Return the session of that id, if it is open."""
        return self._by_id.get(session_id)

    def close(self, session: Session) -> bool:
        """Forget a session and void its token; return whether it was open."""
        if session.token is not None:
            self._by_token.pop(session.token, None)
        return self._by_id.pop(session.session_id, None) is not None

    def with_token(self, token: bytes, peer: Credentials) -> Session | None:
        """Return the session of that token if it is that process's, else None."""
        session = self._by_token.get(token)
        return session if session is not None and session.peer == peer else None

    def attached_to(self, store: HeldStore) -> list[Session]:
        """Return the sessions that map this copy of a store."""
        return [session for session in self._by_id.values() if session.store is store]

    def overdue(self, now: float, hello_within_s: float) -> list[Session]:
        """Return the sessions that never said hello and had their time."""
        return [s for s in self._by_id.values() if s.token is None and now - s.opened_at > hello_within_s]
