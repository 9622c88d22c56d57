"""The runner's session with expertd, and how it is found again when the daemon was restarted, killed or replaced.

The runner keeps the descriptors of the sealed segments it maps. `tend` is called between steps; it is a glance at the
clock, every LOOK_EVERY_S one at the connection, and only if that has ended an attempt to connect again, at growing
intervals. There is no thread: whoever computes tends.

    attached ── the connection ends ──> alone ── somebody serves the store ──────────────> attached
                                          │ └── somebody runs, without it: offer ──> offering ── taken ──> attached
                                          └── nobody runs, or it does not answer: later again

Whatever comes, what is mapped stays readable at its addresses. If the daemon read the store anew, its copy is put under
the mapping, so that the memory is not held twice.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.control_client import ControlClient
from protocol.errors import DaemonSilent, ProtocolError, RequestRefused, VersionMismatch
from protocol.fdpass import close_all, duplicate_all
from protocol.messages import Code, Offer
from protocol.runtime_dir import RuntimeDir
from protocol.segment import replace_mapping, segment_nbytes
from runner.errors import StoreChanged

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
_AGAIN_S_MIN = 0.02
_AGAIN_S_MAX = 0.5
# Behind what will not be better soon: a daemon that is frozen or of another version, an offer that was refused.
_LATER_S = 10.0
# A daemon that lives answers at once; one that does not must not cost a step more than this.
_ANSWER_WITHIN_S = 0.25
_OFFER_WITHIN_S = 120.0
# Why a daemon that runs does not serve the store, where an offer helps.
_LACKING = (Code.UNKNOWN_STORE, Code.STORE_LOADING, Code.OUT_OF_MEMORY, Code.STORE_INVALID)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which store it is, and where its daemon is met."""

    directory: RuntimeDir
    path: Path
    digest: str


class Session:
    """The session of one attached store. Owns the connection and copies of the descriptors; not the views."""

    def __init__(
        self, identity: Identity, client: ControlClient, fds: Sequence[int], views: Sequence[memoryview]
    ) -> None:
        """`fds` are the catalogue's and those of the sealed segments, `views` the mappings of the latter."""
        self._directory = identity.directory
        self._path = identity.path
        self._digest = identity.digest
        self._client: ControlClient | None = client
        self._fds = duplicate_all(fds)
        self._views = list(views)
        self._offered_at: float | None = None
        self._look_at = 0.0
        self._again_s = _AGAIN_S_MIN

    @property
    def is_attached(self) -> bool:
        """Whether a daemon counts this process among those that use the store, as far as is known."""
        return self._client is not None and self._offered_at is None

    @property
    def fds(self) -> Sequence[int]:
        """The catalogue's descriptor and those of the sealed segments, to be offered; they stay the session's."""
        return self._fds

    def tend(self, now: float) -> None:
        """Look after the session; raise StoreChanged if the store is another one now. Blocks for a moment at most."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        if self._client is None:
            self._attach(now)
        elif self._offered_at is not None:
            self._hear(self._client, self._offered_at, now)
        elif not self._client.is_open():
            _log.info("expertd has ended, its store stays mapped digest=%s", self._digest[:12])
            self._let_go()
            self._again_s = _AGAIN_S_MIN
            self._attach(now)

    def go_over(self, client: ControlClient, fds: Sequence[int]) -> None:
        """Go on in a session that somebody opened meanwhile; the descriptors, as above, stay the caller's."""
        self._let_go()
        self._client = client
        self._take([os.dup(fd) for fd in fds])

    def close(self) -> None:
        """End the session; calling it again does nothing."""
        self._let_go()
        close_all(self._fds)
        self._fds = []
        self._views = []

    def _attach(self, now: float) -> None:
        """Try once to have a daemon serve the store to this process again."""
        try:
            client = ControlClient(self._directory, timeout_s=_ANSWER_WITHIN_S)
        except (DaemonSilent, VersionMismatch) as error:
            _log.warning("cannot attach again: %s", error)
            self._try_again(now, _LATER_S)
            return
        except ProtocolError:
            self._again_s = min(2 * self._again_s, _AGAIN_S_MAX)
            self._try_again(now, self._again_s)
            return
        self._client = client
        self._attach_over(client, now)

    def _attach_over(self, client: ControlClient, now: float) -> None:
        try:
            self._take(client.attach(self._digest))
            _log.info("attached again digest=%s pid=%d", self._digest[:12], client.welcome.pid)
        except RequestRefused as refusal:
            if refusal.code not in _LACKING:
                self._give_up(now, _AGAIN_S_MAX)
                return
            self._offer(client, now)
        except ProtocolError as error:
            _log.warning("cannot attach again: %s", error)
            self._give_up(now, _LATER_S)

    def _offer(self, client: ControlClient, now: float) -> None:
        try:
            client.offer(Offer(str(self._path.absolute()), self._digest, None, len(self._fds)), self._fds)
        except ProtocolError:
            self._give_up(now, _AGAIN_S_MAX)
            return
        self._offered_at = now

    def _hear(self, client: ControlClient, offered_at: float, now: float) -> None:
        """Take the answer to the offer, if it has come."""
        if not client.is_answered():
            if now - offered_at > _OFFER_WITHIN_S:
                self._give_up(now, _LATER_S)
            return
        self._offered_at = None
        try:
            client.offer_answer()
        except RequestRefused as refusal:
            self._on_refused(client, refusal, now)
        except ProtocolError:
            self._give_up(now, _AGAIN_S_MIN)
        else:
            _log.info("expertd took the store from here digest=%s pid=%d", self._digest[:12], client.welcome.pid)

    def _on_refused(self, client: ControlClient, refusal: RequestRefused, now: float) -> None:
        if refusal.code == Code.STORE_CHANGED:
            raise StoreChanged(
                f"{self._path}: the store there is another one now; the one that was attached has digest "
                f"{self._digest[:12]}"
            )
        if refusal.code == Code.STORE_HELD:
            self._attach_over(client, now)
            return
        if refusal.code != Code.STORE_LOADING:
            _log.warning("expertd does not take the store from here: %s", refusal)
        self._give_up(now, _AGAIN_S_MAX if refusal.code == Code.STORE_LOADING else _LATER_S)

    def _take(self, fds: list[int]) -> None:
        """Go over to the segments of a daemon, where they are others than those that are mapped."""
        try:
            if len(fds) < len(self._fds) or not _has_same_content(fds[0], self._fds[0]):
                return
            for index in range(len(self._fds)):
                if not os.path.samestat(os.fstat(fds[index]), os.fstat(self._fds[index])):
                    if index > 0:
                        replace_mapping(self._views[index - 1], fds[index])
                    self._fds[index], fds[index] = fds[index], self._fds[index]
        finally:
            close_all(fds)

    def _give_up(self, now: float, again_s: float) -> None:
        self._let_go()
        self._try_again(now, again_s)

    def _try_again(self, now: float, again_s: float) -> None:
        self._look_at = now + again_s

    def _let_go(self) -> None:
        if self._client is not None:
            self._client.close()
        self._client = None
        self._offered_at = None


def _has_same_content(one: int, other: int) -> bool:
    """Whether two catalogues say the same."""
    nbytes = segment_nbytes(one)
    return nbytes == segment_nbytes(other) and os.pread(one, nbytes, 0) == os.pread(other, nbytes, 0)
