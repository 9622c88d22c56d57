"""What the runner sees of an attached store. Knows neither sockets nor files: the client and the tests implement it."""

from typing import Protocol

from protocol.handles import ExpertKey
from protocol.manifest import Manifest


class StoreView(Protocol):
    """A store whose records can be read in place; the memory views stay valid until the store is detached.

    The views may lie in a read-only mapping: nobody writes into them.
    """

    @property
    def manifest(self) -> Manifest:
        """The content of the store."""
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
