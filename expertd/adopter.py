"""The thread that proves what clients offer, and the moment that a load gives them before it reads.

A daemon that starts while runners still map the store of one before it would need the memory twice. They find it at
their next token and offer what they hold; so where somebody maps that store and has no session yet, a load waits
OFFER_WITHIN_S for an offer, and for as long as one is being proven. Where nobody does, nothing waits.

    main thread      start; on_taken and on_failed are posted to it
    proving thread   one offer at a time, with worker threads of its own
    loader thread    still_needs_reading
"""

import logging
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from expertd.adoption import adopt
from expertd.errors import LoadCancelled, StoreInvalid
from expertd.holders import pids_with_segments
from expertd.loader import LoadedStore, SealedPart
from expertd.offers import Adoption
from expertd.store import read_manifest
from expertd.stores import HeldStore
from protocol.messages import Code, Refused, StoreState

logger = logging.getLogger(__name__)

OFFER_WITHIN_S = 3.0
_POLL_S = 0.01


class Adopter:
    """See above."""

    def __init__(
        self,
        *,
        n_threads: int,
        post: Callable[[Callable[[], None]], None],
        on_taken: Callable[[Adoption, LoadedStore | SealedPart], None],
        on_failed: Callable[[Adoption, Refused | None], None],
    ) -> None:
        self._n_threads = n_threads
        self._post = post
        self._on_taken = on_taken
        self._on_failed = on_failed
        self._proofs = ThreadPoolExecutor(1, "expertd-adopter")

    def start(self, adoption: Adoption) -> None:
        """Have an offer proven."""
        self._proofs.submit(self._prove, adoption)

    def close(self) -> None:
        """End the thread; what it was proving is no longer wanted."""
        self._proofs.shutdown(wait=True)

    def still_needs_reading(self, store: HeldStore, attached_pids: Collection[int]) -> bool:
        """Wait for who may offer the store; return False if it is ready, or not wanted, before it was read.

        Where what they have is known already, nobody is waited for.
        """
        known = {os.getpid(), store.asked_by, *attached_pids}
        holders = pids_with_segments(store.digest, known) if store.awaits_offers else []
        until = time.monotonic() + (OFFER_WITHIN_S if holders else 0.0)
        if holders:
            logger.info("waiting for offers digest=%s pids=%s", store.digest[:12], ",".join(map(str, holders)))
        while store.is_proven or (store.awaits_offers and time.monotonic() < until):
            if store.state is not StoreState.LOADING or store.progress.cancelled:
                return False
            Event().wait(_POLL_S)
        return store.state is StoreState.LOADING

    def _prove(self, adoption: Adoption) -> None:
        """Prove in the proving thread and post what came of it."""
        store = adoption.store
        refused: Refused | None
        try:
            if _is_another_there(store):
                adoption.close()
                refused = Refused(Code.STORE_CHANGED, "in that directory there is another store now")
            else:
                loaded = adopt(adoption.fds, store.digest, n_threads=self._n_threads, is_wanted=adoption.is_wanted)
                self._post(lambda: self._on_taken(adoption, loaded))
                return
        except LoadCancelled:
            refused = None
        except StoreInvalid as error:
            refused = Refused(Code.STORE_INVALID, str(error)[:512])
        except Exception:  # the one net of this thread: an offer that is never answered would be waited for
            logger.exception("offer not proven by a fault of ours digest=%s", store.digest[:12])
            refused = Refused(Code.STORE_INVALID, "expertd failed while proving it; its log has the story")
        self._post(lambda: self._on_failed(adoption, refused))


def _is_another_there(store: HeldStore) -> bool:
    """Whether the store's directory holds one of another digest; one that is gone or damaged can still be served."""
    try:
        return read_manifest(store.path).digest != store.digest
    except StoreInvalid:
        return False
