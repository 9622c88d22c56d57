"""Which stores are held, and in what state. Owns the segments' descriptors; knows neither sockets nor files."""

from dataclasses import dataclass, field
from pathlib import Path

from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.loader import LoadedStore, LoadProgress, SealedPart
from expertd.tiered import TieredStore
from protocol.messages import Refused, StoreState, StoreStatus
from protocol.schema import CORRUPT_KEYS_MAX

# At the end of the daemon: a read from a dead disk never ends, and must not keep it from ending.
_LAST_READ_S = 2.0


@dataclass(slots=True, eq=False)
class HeldStore:
    """One store from the wish to load it until its memory is free."""

    digest: str
    path: Path
    wish: MemoryWish = ALL_THERE_IS
    state: StoreState = StoreState.LOADING
    progress: LoadProgress = field(default_factory=LoadProgress)
    loaded: LoadedStore | None = None
    error: Refused | None = None
    is_read: bool = False  # a load from disk is wished for, or under way
    asked_by: int | None = None  # the process that has it loaded: it waits, and offers nothing
    is_proven: bool = False  # what somebody offered is being checked
    awaits_offers: bool = True  # who maps it may have what a load needs
    sealed: SealedPart | None = None  # proven, for the load to go on from
    is_begun: bool = False  # a load from disk has taken what there was to go on from

    @property
    def nbytes(self) -> int:
        """The bytes of its segments; 0 until they are known."""
        return self.loaded.nbytes if self.loaded else 0

    @property
    def tiered(self) -> TieredStore | None:
        """Its slots at work, if it is larger than its memory."""
        return self.loaded.tiered if self.loaded else None

    def begin(self) -> SealedPart | None:
        """Return what a load that begins can go on from, which is its own then; what comes later is too late."""
        self.is_begun = True
        sealed, self.sealed = self.sealed, None
        return sealed

    def close(self) -> None:
        """Let its segments go, and have whatever is under way end."""
        self.progress.cancelled = True
        if self.loaded:
            self.loaded.close()
        if self.sealed:
            self.sealed.close()

    def status(self, n_sessions: int) -> StoreStatus:
        """Return what `status` shows of this store."""
        slots = self.tiered.slots if self.tiered else None
        corrupt = tuple(sorted(slots.corrupt)) if slots else self.loaded.corrupt if self.loaded else ()
        return StoreStatus(
            digest=self.digest,
            path=str(self.path),
            state=self.state,
            nbytes=self.nbytes,
            loaded_nbytes=self.nbytes or self.progress.loaded_nbytes,
            load_s=self.loaded.load_s if self.loaded else 0.0,
            n_experts=len(self.loaded.catalogue.manifest.experts) if self.loaded else 0,
            n_corrupt=len(corrupt),
            corrupt=corrupt[:CORRUPT_KEYS_MAX],
            n_sessions=n_sessions,
            error=self.error,
            memory_nbytes=self.wish.memory_nbytes,
            n_slots=self.tiered.n_slots if self.tiered else 0,
            slot_nbytes=self.tiered.slot_nbytes if self.tiered else 0,
            n_used_slots=slots.n_used if slots else 0,
            n_pinned=len(self.loaded.catalogue.experts) if slots and self.loaded else 0,
            n_loads=slots.n_loads if slots else 0,
            read_nbytes=slots.read_nbytes if slots else 0,
        )


@dataclass(slots=True)
class StoreTable:
    """The stores that are held, by digest, and the orphans.

    An orphan is unloaded but still mapped by a runner, so its memory is not free yet. Its digest may be held again.
    """

    _by_digest: dict[str, HeldStore] = field(default_factory=dict)
    _orphans: list[HeldStore] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._by_digest) + len(self._orphans)

    def all(self) -> list[HeldStore]:
        """Return every store, orphans last."""
        return [*self._by_digest.values(), *self._orphans]

    def find(self, digest: str) -> HeldStore | None:
        """Return the store of that digest, if it is held."""
        return self._by_digest.get(digest)

    def begin(self, digest: str, path: Path, wish: MemoryWish = ALL_THERE_IS) -> HeldStore:
        """Return a store that is now loading; one that failed under that digest is replaced."""
        store = HeldStore(digest, path, wish)
        self._by_digest[digest] = store
        return store

    def finish(self, store: HeldStore, loaded: LoadedStore) -> None:
        """Make a loaded store available; one that was unloaded meanwhile, or is ready by another way, is let go."""
        if self._by_digest.get(store.digest) is not store or store.state is not StoreState.LOADING:
            loaded.close()
            if loaded.tiered:
                loaded.tiered.stop()
            return
        store.loaded = loaded
        store.state = StoreState.READY

    def fail(self, store: HeldStore, error: Refused) -> None:
        """Note why a store could not be loaded, unless it is ready by another way."""
        if store.state is not StoreState.LOADING:
            return
        store.state = StoreState.FAILED
        store.error = error

    def forget(self, store: HeldStore) -> None:
        """Drop a store that never came to be."""
        if self._by_digest.get(store.digest) is store:
            del self._by_digest[store.digest]

    def unload(self, store: HeldStore, *, is_mapped: bool) -> None:
        """Let a held store go; while a runner maps it, it is an orphan."""
        del self._by_digest[store.digest]
        store.close()
        if is_mapped:
            store.state = StoreState.ORPHANED
            self._orphans.append(store)
        elif store.tiered:
            store.tiered.stop()

    def forget_orphan(self, orphan: HeldStore) -> None:
        """Drop an orphan that nobody maps any more."""
        if orphan.tiered:
            orphan.tiered.stop()
        self._orphans = [store for store in self._orphans if store is not orphan]

    def close(self) -> None:
        """Let everything go."""
        for store in self.all():
            store.close()
            if store.tiered:
                store.tiered.stop()
        for store in self.all():
            if store.tiered:
                store.tiered.join(_LAST_READ_S)
        self._by_digest.clear()
        self._orphans.clear()
