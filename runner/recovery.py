"""How a store with slots is had again when its daemon is gone. Blocks its caller, the model's thread, within limits.

A resident store needs no daemon to be computed with; one with slots needs it for whatever is not in memory. So whoever
serves the store next is attached to; a daemon without the store is told to load it as it was held before; and where
none runs, one is started, unless that was forbidden: then somebody else may, for a while.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, ProtocolError, RequestRefused
from protocol.messages import Code, Load, StoreStatus
from protocol.runtime_dir import RuntimeDir
from runner.errors import StoreUnavailable

_STARTS_MAX = 3
_WITHIN_S = 10.0
_POLL_S = 0.05
_LACKING = (Code.UNKNOWN_STORE, Code.OUT_OF_MEMORY, Code.STORE_INVALID)


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
        start_daemon: Callable[[], None] | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._load = load
        self._start_daemon = start_daemon
        self._clock = clock

    def attach(self) -> Had:
        """Return the store attached anew; raise StoreUnavailable."""
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
        if refusal.code not in _LACKING:
            return refusal
        error = client.ask(self._load, StoreStatus).error
        if error is not None:
            return RequestRefused(error.code, error.detail)
        return RequestRefused(Code.STORE_LOADING, "it is being loaded")
