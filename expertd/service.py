"""What each message is answered. Pure decisions: knows neither sockets, threads, files nor clocks.

A message, a session and the time go in; an `Outcome` comes out: the reply, and what its caller is to do. The caller
holds one lock around every call: the control thread and the request thread both ask.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.counters import BadMessage, Counters, Rejection, SlotUse
from expertd.loader import LoadedStore
from expertd.offers import Adoption, Offers
from expertd.requests import Requests
from expertd.sessions import Session, SessionTable
from expertd.store import path_problem
from expertd.stores import HeldStore, StoreTable
from protocol import messages as m
from protocol.fdpass import Credentials
from protocol.messages import Code, Message, Refused, StoreState
from protocol.schema import SESSIONS_MAX, STORES_MAX, TOKEN_NBYTES
from protocol.version import HIGHEST_PROTOCOL_VERSION, LIBRARY_VERSION, LOWEST_PROTOCOL_VERSION

logger = logging.getLogger(__name__)

BAD_MESSAGES_MAX = 3
HELLO_WITHIN_S = 5.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What the machine and this process hold, in bytes."""

    private_nbytes: int
    available_nbytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to do about a message. `fds` stay the store's: they are sent, not given away."""

    reply: Message | None
    fds: tuple[int, ...] = ()
    load: HeldStore | None = None
    adoption: Adoption | None = None
    must_drop: bool = False
    must_stop: bool = False


class Service:
    """The daemon's state and its answers."""

    def __init__(
        self,
        *,
        uid: int,
        pid: int,
        new_token: Callable[[int], bytes],
        memory: Callable[[], MemoryFigures],
        now: float,
        wake_requests: Callable[[], None] = lambda: None,
    ) -> None:
        self._uid = uid
        self._pid = pid
        self._new_token = new_token
        self._memory = memory
        self._started_at = now
        self._busy_at = now
        self._sessions = SessionTable()
        self._stores = StoreTable()
        self.offers = Offers(self._stores, self._sessions)
        self.requests = Requests(self._stores, self._sessions, wake_requests)
        self._n_bad_messages = 0
        self.counters = Counters()
        self._is_draining = False

    # --- sessions -------------------------------------------------------------------------------------------------

    def open_session(self, peer: Credentials, now: float) -> Session | Refused:
        """Return a session for a new connection, or why there is none."""
        if peer.uid != self._uid:
            return self._reject(Rejection.ANOTHER_USER, Refused(Code.BAD_MESSAGE, "another user"))
        if len(self._sessions) >= SESSIONS_MAX:
            return self._reject(Rejection.TOO_MANY, Refused(Code.TOO_MANY, f"{SESSIONS_MAX} sessions are open"))
        if self._is_draining:
            return self._reject(Rejection.DRAINING, Refused(Code.DRAINING, "expertd is stopping"))
        return self._sessions.open(peer, now)

    def close_session(self, session: Session, now: float) -> None:
        """Free all that a session held; closing it again does nothing."""
        is_open = self._sessions.close(session)
        store = session.store
        if store is None or not is_open:
            return
        self._busy_at = now
        self.counters.ended_sessions.add(session.figures(now))
        self.requests.end_session(session, now)
        if store.state is StoreState.ORPHANED and not self._sessions.attached_to(store):
            self._stores.forget_orphan(store)

    def overdue_sessions(self, now: float) -> list[Session]:
        """Return the sessions to be dropped because they never said hello."""
        overdue = self._sessions.overdue(now, HELLO_WITHIN_S)
        self.counters.rejections[Rejection.NO_HELLO] += len(overdue)
        return overdue

    def idle_s(self, now: float) -> float:
        """Return for how long no runner was attached and nothing was loading."""
        is_loading = any(store.state is StoreState.LOADING for store in self._stores.all())
        if is_loading or any(session.store for session in self._sessions):
            self._busy_at = now
        return now - self._busy_at

    def note_bad_message(self, session: Session, detail: str, reason: BadMessage = BadMessage.MALFORMED) -> Outcome:
        """Count a message that is none; the third one ends the session."""
        self._n_bad_messages += 1
        self.counters.bad_messages[reason] += 1
        session.n_bad_messages += 1
        must_drop = session.n_bad_messages >= BAD_MESSAGES_MAX
        self.counters.rejections[Rejection.BAD_MESSAGES] += must_drop
        logger.warning(
            "bad message session=%d uid=%d pid=%d count=%d detail=%s",
            session.session_id, session.peer.uid, session.peer.pid, session.n_bad_messages, detail,
        )  # fmt: skip
        return Outcome(Refused(Code.BAD_MESSAGE, _clipped(detail, 512)), must_drop=must_drop)

    def note_stray_frame(self) -> None:
        """Count a frame on the request channel that belongs to no session."""
        self._n_bad_messages += 1
        self.counters.bad_messages[BadMessage.STRAY] += 1

    # --- control channel ------------------------------------------------------------------------------------------

    def handle(self, session: Session, message: Message, now: float) -> Outcome:
        """Return what to do about a message on the control channel."""
        if isinstance(message, m.Hello):
            return self._welcome(session, message)
        if session.token is None:
            return self.note_bad_message(session, f"{type(message).__name__} came before Hello", BadMessage.UNEXPECTED)
        match message:
            case m.GetStatus():
                return Outcome(self.status(now))
            case m.Attach(digest):
                return self._attach(session, digest)
            case m.Load():
                return self._load(session, message, now)
            case m.Unload(digest):
                return self._unload(digest)
            case m.Stop():
                return Outcome(m.Stopping(), must_stop=True)
        detail = f"{type(message).__name__} is not for the control channel"
        return self.note_bad_message(session, detail, BadMessage.UNEXPECTED)

    def offer(self, session: Session, message: m.Offer, fds: list[int], now: float) -> Outcome:
        """Return what to do about an offer; unless there is an adoption, the descriptors stay the caller's."""
        if session.token is None:
            return self.note_bad_message(session, "Offer came before Hello")
        if self._is_draining:
            return Outcome(Refused(Code.DRAINING, "expertd is stopping"))
        if not _names_a_store(message.path, message.digest):
            return Outcome(Refused(Code.BAD_MESSAGE, "an absolute path and a digest are expected"))
        decided = self.offers.offer(session, message, fds)
        if isinstance(decided, Refused):
            return Outcome(decided)
        self._busy_at = now
        return Outcome(None, adoption=decided)

    def status(self, now: float) -> m.Status:
        """Return what the daemon holds and for whom."""
        memory = self._memory()
        return m.Status(
            pid=self._pid,
            library_version=LIBRARY_VERSION,
            age_s=max(0.0, now - self._started_at),
            private_nbytes=memory.private_nbytes,
            shared_nbytes=sum(store.nbytes for store in self._stores.all()),
            available_nbytes=memory.available_nbytes,
            n_bad_messages=self._n_bad_messages,
            stores=tuple(self._store_status(store) for store in self._stores.all()),
            sessions=tuple(session.status(now) for session in self._sessions),
        )

    def slot_use(self, now: float) -> SlotUse:
        """Return what all sessions since the start have had of slots."""
        use = self.counters.copy().ended_sessions
        for session in self._sessions:
            use.add(session.figures(now))
        return use

    def drain(self) -> None:
        """Take no new work from here on."""
        self._is_draining = True
        for store in self._stores.all():
            store.progress.cancelled = True

    def close(self) -> None:
        """Let every store go."""
        self._stores.close()

    # --- loads -------------------------------------------------------------------------------------

    def begin_load(self, path: Path, digest: str, wish: MemoryWish = ALL_THERE_IS) -> HeldStore:
        """Return a store that is now to be loaded."""
        store = self._stores.begin(digest, path, wish)
        store.is_read = True
        return store

    def hold(self, path: Path, loaded: LoadedStore) -> None:
        """Make a store available that another process loaded."""
        self._stores.finish(self._stores.begin(loaded.digest, path), loaded)

    def held_stores(self) -> list[HeldStore]:
        """Return every store, in whatever state."""
        return self._stores.all()

    def attached_pids(self) -> set[int]:
        """Return the processes that are attached to a store of this daemon."""
        return {session.peer.pid for session in self._sessions if session.store is not None}

    def store_loaded(self, store: HeldStore, loaded: LoadedStore, now: float) -> None:
        """Make a loaded store available."""
        self._busy_at = now
        self.counters.load(store.progress.loaded_nbytes, loaded.load_s)
        self._stores.finish(store, loaded)

    def store_failed(self, store: HeldStore, code: Code, detail: str) -> None:
        """Note why a store could not be loaded; lack of memory names who still holds an unloaded store."""
        if code is Code.OUT_OF_MEMORY:
            detail += self._orphans_hint()
        self.counters.n_load_failures += 1
        self._stores.fail(store, Refused(code, _clipped(detail, 512)))

    # --- request channel ------------------------------------------------------------------------------------------

    def session_of(self, token: bytes, peer: Credentials) -> Session | None:
        """Return the session of that token if it is that process's."""
        return self._sessions.with_token(token, peer)

    # --- private --------------------------------------------------------------------------------------------------

    def _reject(self, why: Rejection, refusal: Refused) -> Refused:
        self.counters.rejections[why] += 1
        return refusal

    def _welcome(self, session: Session, hello: m.Hello) -> Outcome:
        if session.token is not None:
            return self.note_bad_message(session, "a second Hello came", BadMessage.UNEXPECTED)
        version = min(hello.highest_version, HIGHEST_PROTOCOL_VERSION)
        if version < max(hello.lowest_version, LOWEST_PROTOCOL_VERSION):
            mine = f"{LOWEST_PROTOCOL_VERSION} to {HIGHEST_PROTOCOL_VERSION}"
            detail = f"expertd {LIBRARY_VERSION} speaks protocol versions {mine}"
            return Outcome(self._reject(Rejection.VERSION, Refused(Code.VERSION_MISMATCH, detail)), must_drop=True)
        token = self._new_token(TOKEN_NBYTES)
        self._sessions.welcome(session, token, _clipped(hello.library_version, 32))
        return Outcome(m.Welcome(version, LIBRARY_VERSION, self._pid, token))

    def _attach(self, session: Session, digest: str) -> Outcome:
        if session.store is not None:
            return Outcome(Refused(Code.ALREADY_ATTACHED, "a session attaches to one store"))
        store = self._stores.find(digest)
        if store is None:
            return Outcome(Refused(Code.UNKNOWN_STORE, f"no store with digest {digest[:12]} is loaded"))
        if store.error is not None:
            return Outcome(store.error)
        if store.loaded is None:
            return Outcome(Refused(Code.STORE_LOADING, f"store {digest[:12]} is being loaded"))
        session.store = store
        fds = tuple(store.loaded.fds)
        return Outcome(m.Attached(digest, len(fds)), fds=fds)

    def _load(self, session: Session, wanted: m.Load, now: float) -> Outcome:
        path, digest = wanted.path, wanted.digest
        if self._is_draining:
            return Outcome(Refused(Code.DRAINING, "expertd is stopping"))
        if not _names_a_store(path, digest):
            return Outcome(Refused(Code.BAD_MESSAGE, "an absolute path and a digest are expected"))
        store = self._stores.find(digest)
        self.offers.welcome(digest)
        if store is not None and store.state is StoreState.LOADING and not store.is_read:
            store.is_read = True  # it is being proven, which may fail
            return Outcome(self._store_status(store), load=store)
        if store is not None and store.state in (StoreState.LOADING, StoreState.READY):
            return Outcome(self._store_status(store))
        if store is None and len(self._stores) >= STORES_MAX:
            return Outcome(Refused(Code.TOO_MANY, f"{STORES_MAX} stores are held; unload one"))
        self._busy_at = now
        store = self.begin_load(Path(path), digest, MemoryWish(wanted.memory_nbytes, wanted.pinned))
        store.asked_by = session.peer.pid
        return Outcome(self._store_status(store), load=store)

    def _unload(self, digest: str) -> Outcome:
        store = self._stores.find(digest)
        if store is None:
            return Outcome(Refused(Code.UNKNOWN_STORE, f"no store with digest {digest[:12]} is loaded"))
        is_mapped = bool(self._sessions.attached_to(store))
        self._stores.unload(store, is_mapped=is_mapped)
        if is_mapped:
            self.offers.refuse(digest)
        return Outcome(m.Unloaded(digest))

    def _store_status(self, store: HeldStore) -> m.StoreStatus:
        return store.status(len(self._sessions.attached_to(store)))

    def _orphans_hint(self) -> str:
        orphaned = [s for s in self._sessions if s.store is not None and s.store.state is StoreState.ORPHANED]
        pids = [str(session.peer.pid) for session in orphaned]
        return f"; runners that still map an unloaded store: pid {', '.join(pids)}" if pids else ""


def _names_a_store(path: str, digest: str) -> bool:
    return _DIGEST.fullmatch(digest) is not None and Path(path).is_absolute() and not path_problem(path)


def _clipped(text: str, length_max: int) -> str:
    """Return a text as ASCII of bounded length: so bounded, a status of every store and session fits into a message."""
    return text.encode("ascii", "backslashreplace")[:length_max].decode()
