"""How a store with slots is had again when its daemon is gone. Blocks its caller, the model's thread, within limits.

A resident store needs no daemon to be computed with; one with slots needs it for whatever is not in memory. So whoever
serves the store next is attached to; a daemon without the store is offered what is sealed of it, and told to load it as
it was held before if it does not take that; and where none runs, one is started, unless that was forbidden: then
somebody else may, for a while.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Protocol

from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, ProtocolError, RequestRefused
from protocol.messages import Code, Load, Offer, StoreStatus
from protocol.runtime_dir import RuntimeDir
from runner.errors import StoreChanged, StoreUnavailable

_STARTS_MAX = 3
_WITHIN_S = 10.0
_OFFER_WITHIN_S = 30.0
_POLL_S = 0.05
_LACKING = (Code.UNKNOWN_STORE, Code.OUT_OF_MEMORY, Code.STORE_INVALID)


class Sealed(Protocol):
    """Who has the sealed part of the store: the descriptors, catalogue first, which stay its own."""

    @property
    def fds(self) -> Sequence[int]:
        """Return them."""


@dataclass(frozen=True, slots=True)
class Had:
    """A session with a daemon that serves the store, and the descriptors it sent; whoever takes it owns both."""

    client: ControlClient
    fds: list[int]


class Recovery:
    """Gets one store served again. `start_daemon` starts a daemon without stores; None: that is not allowed."""

    def __init__(
        self,
        directory: RuntimeDir,
        load: Load,
        sealed: Sealed,
        start_daemon: Callable[[], None] | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._load = load
        self._sealed = sealed
        self._offered_to: int | None = None
        self._start_daemon = start_daemon
        self._clock = clock

    def attach(self) -> Had:
        """Return the store attached anew; raise StoreUnavailable or StoreChanged."""
        n_starts = 0
        until = self._clock() + _WITHIN_S
        while True:
            try:
                return self._attach_once()
            except RequestRefused as refusal:
                reason = refusal.detail
                if refusal.code == Code.STORE_LOADING:
                    until = max(until, self._clock() + _WITHIN_S)
            except DaemonUnavailable as error:
                reason = str(error)
                if self._start_daemon is not None and n_starts < _STARTS_MAX:
                    n_starts += 1
                    self._start_daemon()
                    until = self._clock() + _WITHIN_S
            except ProtocolError as error:
                raise StoreUnavailable(f"{self._load.path}: {error}") from None
            if self._clock() > until:
                raise StoreUnavailable(
                    f"{self._load.path}: {reason}, and what is not in memory cannot be read without it"
                )
            Event().wait(_POLL_S)

    def _attach_once(self) -> Had:
        client = ControlClient(self._directory)
        try:
            return Had(client, client.attach(self._load.digest))
        except RequestRefused as refusal:
            with client:
                raise self._ask_for_it(client, refusal) from None
        except BaseException:
            client.close()
            raise

    def _ask_for_it(self, client: ControlClient, refusal: RequestRefused) -> RequestRefused:
        """Have a daemon that lacks the store load it; return why it is not there yet."""
        is_lacking = refusal.code in _LACKING
        if is_lacking or (refusal.code == Code.STORE_LOADING and client.welcome.pid != self._offered_to):
            answer = self._offer(client)
            if answer.code in (Code.STORE_LOADING, Code.STORE_HELD):
                return RequestRefused(Code.STORE_LOADING, answer.detail)
        if not is_lacking:
            return refusal
        error = client.ask(self._load, StoreStatus).error
        if error is not None:
            return RequestRefused(error.code, error.detail)
        return RequestRefused(Code.STORE_LOADING, "it is being loaded")

    def _offer(self, client: ControlClient) -> RequestRefused:
        """Offer a daemon the sealed part of the store, so that it makes slots alone; return what it says to that."""
        load, fds = self._load, self._sealed.fds
        self._offered_to = client.welcome.pid
        client.offer(Offer(load.path, load.digest, load.memory_nbytes, len(fds)), fds)
        until = self._clock() + _OFFER_WITHIN_S
        while not client.is_answered() and self._clock() < until:
            Event().wait(_POLL_S)
        try:
            client.offer_answer()
        except RequestRefused as refusal:
            if refusal.code == Code.STORE_CHANGED:
                raise StoreChanged(f"{load.path}: the store there is another one now") from None
            return refusal
        return RequestRefused(Code.STORE_HELD, "it was taken whole")
