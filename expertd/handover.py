"""A new daemon takes the stores of the one before it. Blocks its caller, the daemon-to-be.

    new                                  old
      | a session for each store: attach   | an ordinary client's; it serves everybody else meanwhile
      | proves every byte                  |
      | Stop ----------------------------->| Draining to its sessions, its sockets and its lock go
      | takes the lock, serves             | has ended

The memory is the same all along: both hold descriptors of the same segments, and nothing is read from disk. Runners see
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
from expertd.loader import LoadedStore
from expertd.systemd import KeptStore
from protocol import messages as m
from protocol.catalogue import decode_catalogue
from protocol.control_client import ControlClient
from protocol.errors import ProtocolError, RequestRefused, SegmentError, VersionMismatch
from protocol.fdpass import close_all
from protocol.handles import ExpertKey
from protocol.messages import Status, StoreState, StoreStatus
from protocol.runtime_dir import RuntimeDir
from protocol.segment import map_segment, segment_nbytes

logger = logging.getLogger(__name__)

_STOP_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class TakenStore:
    """A store that the daemon before had; `loaded` is None where it was still loading, has slots, or was unloaded."""

    path: Path
    digest: str
    loaded: LoadedStore | None
    wish: MemoryWish = ALL_THERE_IS
    is_unloaded: bool = False


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
            loaded = adopt(store.fds, store.digest, n_threads=n_threads, may_lack_experts=True)
        except StoreInvalid as error:
            logger.error("store not adopted digest=%s error=%s", store.digest[:12], error)  # noqa: TRY400 - it is said
        else:
            taken.append(TakenStore(store.path, store.digest, loaded))
    return taken


def _take_stores(directory: RuntimeDir, stores: Sequence[StoreStatus], n_threads: int) -> list[TakenStore]:
    taken: list[TakenStore] = []
    try:
        for store in stores:
            wish = MemoryWish(store.memory_nbytes)
            if store.state is StoreState.READY and store.n_slots:
                pinned = MemoryWish(store.memory_nbytes, _pinned(directory, store.digest))
                taken.append(TakenStore(Path(store.path), store.digest, None, pinned))
            elif store.state is StoreState.READY:
                loaded = _take(directory, store.digest, n_threads)
                taken.append(TakenStore(Path(store.path), store.digest, loaded, wish))
            elif store.state is StoreState.LOADING:
                taken.append(TakenStore(Path(store.path), store.digest, None, wish))
            elif store.state is StoreState.ORPHANED:
                taken.append(TakenStore(Path(store.path), store.digest, None, is_unloaded=True))
    except BaseException:
        _close(taken)
        raise
    return taken


def _take(directory: RuntimeDir, digest: str, n_threads: int) -> LoadedStore | None:
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


def _pinned(directory: RuntimeDir, digest: str) -> tuple[ExpertKey, ...]:
    """Return the experts of a store with slots that are in memory for good; none if it is no longer there."""
    try:
        with ControlClient(directory) as client:
            fds = client.attach(digest)
        try:
            return tuple(decode_catalogue(bytes(map_segment(fds[0], segment_nbytes(fds[0])))).experts)
        finally:
            close_all(fds)
    except (RequestRefused, SegmentError) as error:
        logger.warning("pinned experts not taken over digest=%s reason=%s", digest[:12], error)
        return ()


def _close(taken: Sequence[TakenStore]) -> None:
    for store in taken:
        if store.loaded is not None:
            store.loaded.close()
