"""The descriptors of an offer as they come in, over one packet or several: one inbox a connection."""

from dataclasses import dataclass

from protocol.errors import MalformedMessage
from protocol.fdpass import CONTINUATION, close_all
from protocol.messages import Offer


@dataclass(frozen=True, slots=True)
class WholeOffer:
    """An offer with all its descriptors; whoever takes it owns them."""

    message: Offer
    fds: list[int]


class Inbox:
    """What one connection has sent of an offer."""

    def __init__(self) -> None:
        self._offer: Offer | None = None
        self._fds: list[int] = []

    @property
    def is_waiting(self) -> bool:
        """Whether further descriptors are awaited: the next packet brings them."""
        return self._offer is not None

    def begin(self, offer: Offer, fds: list[int]) -> WholeOffer | None:
        """Take an offer and its first descriptors; return it if these were all.

        Raise MalformedMessage, here as below: the packet's descriptors stay the caller's then.
        """
        self._offer = offer
        return self._add(fds)

    def go_on(self, data: bytes, fds: list[int]) -> WholeOffer | None:
        """Take the packet that follows; return the offer if it is whole. Raise MalformedMessage."""
        if data != CONTINUATION or not fds:
            self.clear()
            raise MalformedMessage("an offer's descriptors were expected")
        return self._add(fds)

    def clear(self) -> None:
        """Close what came."""
        close_all(self._fds)
        self._fds = []
        self._offer = None

    def _add(self, fds: list[int]) -> WholeOffer | None:
        offer = self._offer
        if offer is None:
            raise MalformedMessage("descriptors came without an offer")
        n_fds = len(self._fds) + len(fds)
        if n_fds > offer.n_fds or (n_fds < offer.n_fds and not fds):
            self.clear()
            raise MalformedMessage(f"{offer.n_fds} descriptors were announced, {n_fds} came")
        self._fds += fds
        if n_fds < offer.n_fds:
            return None
        whole = WholeOffer(offer, self._fds)
        self._offer, self._fds = None, []
        return whole
