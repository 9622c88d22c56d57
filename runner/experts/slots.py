"""Which expert lies in which slot, who uses it, and which slot a miss gets. Pure decisions: nothing is copied here.

Owns the table of slots, and nothing on the device. Knows neither queues nor events: the cache, which calls this under
its lock, does what is decided here, and tells when it is done. Nobody blocks.

A pool of equal slots serves all layers. At rest a layer has at most as many cached experts as its quota says, and the
other slots are spare. A miss fills a spare one, so that it does not wait for the victim's last use; the layer is then
over its quota until the call ends, and `settle` makes the victims' slots spare. Where there is no spare slot left, the
victim's own is refilled. A prefetch fills spare slots only and evicts nothing; its expert is cached once it is used.

    SPARE ──claim, guess──► FILLING ──filled──► READY ──evicted, not needed──► SPARE
                               └──not needed──► DROPPED ──given_back──────────► SPARE
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from runner.experts.counters import Tally
from runner.experts.policies import LRU, Policy


class SlotState(Enum):
    """What a slot holds: nothing, an expert that is being copied, one nobody wants any more, one that is there."""

    SPARE = auto()
    FILLING = auto()
    DROPPED = auto()
    READY = auto()


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot for an expert that was not cached; `is_new` if it is to be filled, else a prefetch does or did so."""

    slot: int
    is_new: bool


class SlotTable:
    """The slots of all layers: sum(quotas) + n_spares of them, numbered from 0. Called under the cache's lock."""

    def __init__(
        self,
        quotas: Sequence[int],
        n_spares: int,
        tally: Tally,
        *,
        keeps: bool = True,
        new_policy: Callable[[], Policy] = LRU,
    ) -> None:
        """Make an empty table. Unless it `keeps` experts, each is evicted at the end of the call that used it."""
        self.n_slots = sum(quotas) + n_spares
        self._quotas = quotas
        self._n_guesses_max = n_spares
        self._tally = tally
        self._keeps = keeps
        self._policies = [new_policy() for _ in quotas]
        self._cached: list[dict[int, int]] = [{} for _ in quotas]  # a layer's expert → its slot
        self._guesses: dict[tuple[int, int], int] = {}  # (layer, expert) prefetched and not used → its slot
        self._states = [SlotState.SPARE] * self.n_slots
        self._n_pins = [0] * self.n_slots
        # The slot that was given back first is taken first: its last use is the longest ago.
        self._spares = deque(range(self.n_slots))
        self._dropped: list[int] = []
        self._n_dropped = 0
        self._groups: Sequence[Sequence[int]] = ()

    def is_ready(self, slot: int) -> bool:
        """Return whether all of the slot's expert was submitted to the copy queue."""
        return self._states[slot] is SlotState.READY

    def begin(self, layer: int, groups: Sequence[Sequence[int]]) -> None:
        """Note a call of the layer with those experts, in groups by their last token, the earliest one first.

        What was prefetched for the layer and is not among them is not needed.
        """
        self._groups = groups
        self._note_uses(layer)
        if self._guesses:
            used = {expert for group in groups for expert in group}
            for guess in [guess for guess in self._guesses if guess[0] == layer and guess[1] not in used]:
                self._drop_guess(guess)

    def pin(self, layer: int, expert: int) -> int | None:
        """Pin the expert where it is cached and return its slot; None: it has to be claimed."""
        slot = self._cached[layer].get(expert)
        if slot is not None:
            self._n_pins[slot] += 1
            self._tally.hits += 1
        return slot

    def claim(self, layer: int, expert: int) -> Claim | None:
        """Cache an expert that is not, and pin it; None: a slot has to be unpinned or given back before."""
        slot = self._guesses.pop((layer, expert), None)
        is_new = slot is None
        if slot is None:
            slot = self._take_slot(layer)
            if slot is None:
                return None
            self._states[slot] = SlotState.FILLING
        else:
            self._tally.prefetches_used += 1
            self._tally.prefetches_late += not self.is_ready(slot)
        self._cached[layer][expert] = slot
        self._policies[layer].add(expert)
        self._n_pins[slot] += 1
        self._tally.misses += 1
        return Claim(slot, is_new)

    def n_cached(self, layer: int) -> int:
        """Return how many of the layer's experts lie in slots or are being copied there, prefetched ones aside."""
        return len(self._cached[layer])

    def may_guess(self, layer: int, n_experts: int) -> bool:
        """Return whether a prefetch for the layer, of so many experts, would find a slot and something to copy."""
        has_room = bool(self._spares) and len(self._guesses) < self._n_guesses_max
        return has_room and len(self._cached[layer]) < n_experts

    def guess(self, layer: int, expert: int) -> int | None:
        """Return the slot to prefetch an expert into; None if it is there already or no slot is to spare."""
        is_there = expert in self._cached[layer] or (layer, expert) in self._guesses
        if is_there or not self._spares or len(self._guesses) >= self._n_guesses_max:
            return None
        slot = self._guesses[layer, expert] = self._spares.popleft()
        self._states[slot] = SlotState.FILLING
        self._tally.prefetches_issued += 1
        return slot

    def unpin(self, slots: Iterable[int]) -> None:
        """Note that the last use of each of these slots was recorded, or that there was none."""
        for slot in slots:
            self._n_pins[slot] -= 1

    def unpin_all(self) -> None:
        """Note that the device is idle and no call is under way; every layer is brought to its quota."""
        self._n_pins = [0] * self.n_slots
        for layer in range(len(self._quotas)):
            self.settle(layer)

    def settle(self, layer: int) -> None:
        """Evict what a layer holds beyond its quota, at the end of a call: all that it used is unpinned."""
        cached = self._cached[layer]
        n_kept = self._quotas[layer] if self._keeps else 0
        if len(cached) > n_kept:
            while len(cached) > n_kept:
                self._evict_one_of(layer, list(cached))

    def filled(self, slot: int) -> None:
        """Note that the copy engine submitted all of a slot's expert."""
        self._states[slot] = SlotState.READY

    def given_back(self, slot: int) -> None:
        """Note that the copy engine submits nothing more for a slot that was dropped."""
        self._n_dropped -= 1
        self._make_spare(slot)

    def take_dropped(self) -> list[int]:
        """Return the slots dropped since the last time, whose copies the engine is to cancel."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _take_slot(self, layer: int) -> int | None:
        """Return a slot to fill for the layer, none of those that a pinned expert lies in."""
        if self._spares:
            return self._spares.popleft()
        cached = self._cached[layer]
        evictable = [expert for expert, slot in cached.items() if not self._n_pins[slot]]
        if evictable and len(cached) >= self._quotas[layer]:
            self._evict_one_of(layer, evictable)
        elif self._n_dropped:
            return None  # one comes free as soon as the engine has heard of it
        elif self._guesses:
            self._drop_guess(next(reversed(self._guesses)))  # the one that is needed last
        elif evictable:
            self._evict_one_of(layer, evictable)
        return self._spares.popleft() if self._spares else None

    def _evict_one_of(self, layer: int, evictable: Sequence[int]) -> None:
        policy = self._policies[layer]
        if len(self._groups) > 1:
            self._note_uses(layer)  # once more: those that came in during the call have their place in the order, too
        victim = policy.victim(evictable)
        policy.remove(victim)
        self._tally.evictions += 1
        self._give_back(self._cached[layer].pop(victim))

    def _drop_guess(self, guess: tuple[int, int]) -> None:
        slot = self._guesses.pop(guess)
        if self.is_ready(slot):
            self._tally.prefetches_wasted += 1
        else:
            self._tally.prefetches_cancelled += 1
        self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        if self._states[slot] is SlotState.FILLING:
            self._states[slot] = SlotState.DROPPED
            self._dropped.append(slot)
            self._n_dropped += 1
        else:
            self._make_spare(slot)

    def _make_spare(self, slot: int) -> None:
        self._states[slot] = SlotState.SPARE
        self._spares.append(slot)

    def _note_uses(self, layer: int) -> None:
        for group in self._groups:
            self._policies[layer].use(group)
