"""What becomes of segments that a client offers. Pure decisions: knows neither sockets, threads nor files.

    offer    taken for proof, or refused at once
    taken    proven: the store is ready, a load of it that is under way is not needed any more
             proven of a store with slots: a load goes on from what is sealed, and makes slots
    failed   not proven, or not needed: a load under way goes on, and without one nothing is left of the offer

The proof and a load of the same store may run side by side; whichever is done first makes the store ready.
"""

from dataclasses import dataclass
from pathlib import Path

from expertd.budget import MemoryWish
from expertd.loader import LoadedStore, SealedPart
from expertd.sessions import Session, SessionTable
from expertd.stores import HeldStore, StoreTable
from protocol import messages as m
from protocol.fdpass import close_all
from protocol.messages import Code, Refused, StoreState
from protocol.schema import STORES_MAX

_LOADING = Refused(Code.STORE_LOADING, "it is being loaded")


@dataclass(frozen=True, slots=True, eq=False)
class Adoption:
    """An offer that is being proven; it owns the descriptors until it is decided on."""

    store: HeldStore
    session: Session
    fds: list[int]

    def close(self) -> None:
        """Let the descriptors go."""
        close_all(self.fds)
        self.fds.clear()

    def is_wanted(self) -> bool:
        """Whether the store still needs it; may be asked from any thread."""
        return self.store.state is StoreState.LOADING and not self.store.progress.cancelled


class Offers:
    """Decides on offers, over the service's tables and under its caller's lock."""

    def __init__(self, stores: StoreTable, sessions: SessionTable) -> None:
        self._stores = stores
        self._sessions = sessions
        self._unwanted: set[str] = set()

    def refuse(self, digest: str) -> None:
        """Take no offer of that store: it was unloaded while a client mapped it."""
        self._unwanted.add(digest)

    def welcome(self, digest: str) -> None:
        """Take offers of that store again: it is wanted."""
        self._unwanted.discard(digest)

    def offer(self, session: Session, message: m.Offer, fds: list[int]) -> Adoption | Refused:
        """Return what is to be proven, which owns the descriptors then, or why nothing is."""
        store = self._stores.find(message.digest)
        refusal = self._refusal(session, message, store)
        if refusal is not None:
            return refusal
        if store is None or store.state is not StoreState.LOADING:
            store = self._stores.begin(message.digest, Path(message.path), MemoryWish(message.memory_nbytes))
        store.is_proven = True
        return Adoption(store, session, fds)

    def taken(self, adoption: Adoption, loaded: LoadedStore) -> m.Message:
        """Serve what was proven; return the answer to who offered it."""
        store = adoption.store
        store.is_proven = False
        if not adoption.is_wanted():
            loaded.close()
            return self._not_needed(store)
        if store.is_read and _is_more(loaded.nbytes, store.wish):
            loaded.close()
            store.awaits_offers = False
            return _LOADING
        self._stores.finish(store, loaded)
        store.progress.cancelled = True  # a load of it that is under way
        if self._sessions.is_open(adoption.session):
            adoption.session.store = store
        return m.Attached(store.digest, 0)

    def taken_in_part(self, adoption: Adoption, sealed: SealedPart) -> m.Message:
        """Have a load go on from what was proven; return the answer to who offered it."""
        store = adoption.store
        store.is_proven = False
        if not adoption.is_wanted():
            sealed.close()
            return self._not_needed(store)
        if store.is_begun:
            sealed.close()
            return _LOADING
        store.sealed = sealed
        store.awaits_offers = False
        if not store.is_read:  # nobody but who offers it has said how it is to be held
            store.wish = MemoryWish(store.wish.memory_nbytes, tuple(sealed.catalogue.experts))
        return _LOADING

    def begin_load(self, store: HeldStore) -> bool:
        """Return whether a load is to be begun for what was proven of a store; it counts as begun from here on."""
        is_due = store.sealed is not None and not store.is_read
        store.is_read = store.is_read or is_due
        return is_due

    def failed(self, adoption: Adoption, refused: Refused | None) -> m.Message:
        """Return the answer to an offer that is not taken: the reason, None if it was not needed any more."""
        store = adoption.store
        store.is_proven = False
        if not store.is_read and store.state is StoreState.LOADING:
            self._stores.forget(store)
        return refused or self._not_needed(store)

    def _refusal(self, session: Session, message: m.Offer, store: HeldStore | None) -> Refused | None:
        digest = message.digest
        if session.store is not None:
            return Refused(Code.ALREADY_ATTACHED, "a session attaches to one store")
        if digest in self._unwanted:
            return Refused(Code.UNKNOWN_STORE, f"store {digest[:12]} was unloaded")
        if store is not None and store.state is StoreState.READY:
            return Refused(Code.STORE_HELD, f"store {digest[:12]} is in memory already")
        if store is not None and (store.is_proven or store.sealed is not None):
            return Refused(Code.STORE_LOADING, f"store {digest[:12]} was offered by somebody else")
        if self._holds_another(message):
            return Refused(Code.STORE_CHANGED, "another store is loaded from that directory")
        if store is None and len(self._stores) >= STORES_MAX:
            return Refused(Code.TOO_MANY, f"{STORES_MAX} stores are held; unload one")
        return None

    def _holds_another(self, message: m.Offer) -> bool:
        return any(
            str(store.path) == message.path and store.digest != message.digest and store.error is None
            for store in self._stores.all()
            if store.state is not StoreState.ORPHANED
        )

    def _not_needed(self, store: HeldStore) -> Refused:
        if self._stores.find(store.digest) is store and store.state is StoreState.READY:
            return Refused(Code.STORE_HELD, f"store {store.digest[:12]} is in memory already")
        return Refused(Code.UNKNOWN_STORE, f"store {store.digest[:12]} is no longer wanted")


def _is_more(nbytes: int, wish: MemoryWish) -> bool:
    return wish.memory_nbytes is not None and nbytes > wish.memory_nbytes
