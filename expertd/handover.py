"""A new daemon takes the stores of the one before it. Blocks its caller, the daemon-to-be.

    new                                  old
      | a session for each store: attach   | an ordinary client's; it serves everybody else meanwhile
      | proves every byte                  |
      | Stop ----------------------------->| Draining to its sessions, its sockets and its lock go
      | takes the lock, serves             | has ended

The memory is the same all along: both hold descriptors of the same sealed segments, and nothing is read from disk but
what slots are filled with anew. Runners see
their connection end, and attach to whoever serves next. Until Stop is said nothing has changed for anybody. Where the
one before has ended already, the service manager may have kept the descriptors.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertd.admin import stop_daemon
from expertd.adoption import adopt
from expertd.budget import ALL_THERE_IS, MemoryWish
from expertd.errors import StartFailed, StoreInvalid
from expertd.loader import LoadedStore, SealedPart
from expertd.systemd import KeptStore
from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.errors import ProtocolError, RequestRefused, VersionMismatch
from protocol.messages import Status, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir

logger = logging.getLogger(__name__)

_STOP_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class TakenStore:
    """A store that the daemon before had: all of it, or of one with slots what is sealed; nothing of one in loading."""

    path: Path
    digest: str
    loaded: LoadedStore | None = None
    sealed: SealedPart | None = None
    wish: MemoryWish = ALL_THERE_IS
    is_unloaded: bool = False

    def close(self) -> None:
        """Let it go."""
        if self.loaded is not None:
            self.loaded.close()
        if self.sealed is not None:
            self.sealed.close()


def take_over(directory: RuntimeDir, *, n_threads: int) -> list[TakenStore]:
    """Return the stores of the daemon that runs, which has ended then; raise StartFailed.

    The caller owns them, and takes the lock next.
    """
    try:
        with ControlClient(directory) as client:
            taken = _take_stores(directory, client.ask(m.GetStatus(), Status).stores, n_threads)
            pid, has_ended = client.welcome.pid, stop_daemon(client, within_s=_STOP_WITHIN_S)
    except VersionMismatch as error:
        raise StartFailed(f"the stores cannot be taken over: {error}") from None
    except ProtocolError as error:
        raise StartFailed(f"nothing is taken over: {error}") from None
    if not has_ended:
        _close(taken)
        raise StartFailed(f"the daemon before (pid {pid}) does not end; `kill -9 {pid}` if it must")
    return taken


def prove_kept(stores: Sequence[KeptStore], *, n_threads: int) -> list[TakenStore]:
    """Return the stores that the service manager kept and that are what they should be; the others are closed."""
    taken = []
    for store in stores:
        try:
            proven = adopt(store.fds, store.digest, n_threads=n_threads, may_lack_experts=True)
        except StoreInvalid as error:
            logger.error("store not adopted digest=%s error=%s", store.digest[:12], error)  # noqa: TRY400 - it is said
        else:
            taken.append(_taken(store.path, store.digest, store.memory_nbytes, proven))
    return taken


def _take_stores(directory: RuntimeDir, stores: Sequence[StoreStatus], n_threads: int) -> list[TakenStore]:
    taken: list[TakenStore] = []
    try:
        for store in stores:
            path, digest, memory_nbytes = Path(store.path), store.digest, store.memory_nbytes
            if store.state is StoreState.READY:
                taken.append(_taken(path, digest, memory_nbytes, _take(directory, digest, n_threads)))
            elif store.state is StoreState.LOADING:
                taken.append(_taken(path, digest, memory_nbytes, None))
            elif store.state is StoreState.ORPHANED:
                taken.append(TakenStore(path, digest, is_unloaded=True))
    except BaseException:
        _close(taken)
        raise
    return taken


def _taken(path: Path, digest: str, memory_nbytes: int | None, proven: LoadedStore | SealedPart | None) -> TakenStore:
    """Return a store with what was had of it, to be held as it was."""
    wish = MemoryWish(memory_nbytes)
    if isinstance(proven, SealedPart):
        return TakenStore(path, digest, sealed=proven, wish=MemoryWish(memory_nbytes, tuple(proven.catalogue.experts)))
    return TakenStore(path, digest, loaded=proven, wish=wish)


def _take(directory: RuntimeDir, digest: str, n_threads: int) -> LoadedStore | SealedPart | None:
    """Return a store of the running daemon, proven; None if it is no longer there or not what it should be."""
    try:
        with ControlClient(directory) as client:
            fds = client.attach(digest)
    except RequestRefused as refusal:
        logger.warning("store not taken over digest=%s reason=%s", digest[:12], refusal)
        return None
    try:
        return adopt(fds, digest, n_threads=n_threads, may_lack_experts=True)
    except StoreInvalid as error:  # memory rots; what is on disk may be whole
        logger.error("store not taken over digest=%s error=%s", digest[:12], error)  # noqa: TRY400 - the cause is said
        return None


def _close(taken: Sequence[TakenStore]) -> None:
    for store in taken:
        store.close()
