"""What the runner sees of an attached store. Knows neither sockets nor files: the client and the tests implement it."""

from collections.abc import Collection
from typing import Protocol

from protocol.bell import Bell
from protocol.handles import ExpertHandle, ExpertKey
from protocol.manifest import Manifest
from protocol.messages import Message
from protocol.slot_table import SlotTable


class StoreView(Protocol):
    """A store whose records can be read in place; the memory views stay valid until the store is detached.

    The views may lie in a read-only mapping: nobody writes into them.
    """

    @property
    def manifest(self) -> Manifest:
        """The content of the store."""
        ...

    @property
    def host_slots(self) -> "HostSlots | None":
        """Where the experts are that `expert_record` does not have; None for a store that is all in memory."""
        ...

    def expert_record(self, key: ExpertKey) -> memoryview:
        """Return the bytes of one expert; raise CorruptExpert."""
        ...

    def dense_record(self, name: str) -> memoryview:
        """Return the bytes of one dense tensor's record."""
        ...

    def side_file(self, name: str) -> bytes | None:
        """Return a side file, checked against the manifest; None if the store has none of that name."""
        ...


class HostSlots(Protocol):
    """The slots of a store that is larger than its memory, and the requests by which expertd fills them.

    They are one session's. When it is gone (SessionGone), `renewed` gives those of another one.
    """

    @property
    def keys(self) -> Collection[ExpertKey]:
        """The experts that have to be acquired."""
        ...

    @property
    def n_slots(self) -> int:
        """How many slots there are."""
        ...

    @property
    def table(self) -> SlotTable:
        """What each slot holds now."""
        ...

    @property
    def requests(self) -> "RequestChannel":
        """How the session asks."""
        ...

    def slot(self, slot: int) -> memoryview:
        """Return the bytes of a slot, which others write: read them as the table says."""
        ...

    def slot_of(self, handle: ExpertHandle) -> int:
        """Return the slot that a handle names; raise StoreChanged if there is none."""
        ...

    def renewed(self) -> "HostSlots":
        """Return the slots of a new session in place of one that is gone; raise StoreUnavailable or StoreChanged."""
        ...


class RequestChannel(Protocol):
    """A session's end of the request channel; of one thread."""

    def send(self, message: Message) -> None:
        """Send a message, which may be lost; raise SessionGone."""
        ...

    def receive(self) -> Message | None:
        """Return the next message of the daemon, None if there is none yet; raise SessionGone."""
        ...

    def wait(self, bell: Bell, n_rings: int, timeout_s: float) -> bool:
        """Wait for a message, or until the bell was rung more often than that; return False if nothing came in time.

        Raise SessionGone or StoreUnavailable.
        """
        ...
