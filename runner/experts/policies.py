"""Which expert of one layer leaves its slot. Pure decisions: knows no slots, no bytes, no other layer.

A policy is told what happens to its layer's slots and asked for a victim. In this order, at every step:

    policy.use(chosen)                         the step's experts, whether they lie in slots or not
    for each that does not:
        policy.remove(policy.victim(evictable))    if there is no free slot
        policy.add(expert)

LRU decides at run time: what it asks for costs a microsecond. The others stand beside it for comparison: LFU, a random
choice, and Belady's, which has to know the future and so is an upper bound on what any of them can do without
prefetching (Belady, A study of replacement algorithms for a virtual-storage computer, 1966).
"""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class Policy(Protocol):
    """What decides for one layer. Experts are numbers within the layer."""

    def use(self, experts: Iterable[int]) -> None:
        """Note a step of that layer, which computes with those experts."""
        ...

    def add(self, expert: int) -> None:
        """Note that this expert lies in a slot from now on; a copy counts as a use at the present step."""
        ...

    def remove(self, expert: int) -> None:
        """Note that this expert lies in no slot any more."""
        ...

    def victim(self, evictable: Collection[int]) -> int:
        """Return which of these experts, at least one and all of them in slots, should go. Changes nothing."""
        ...


class LRU:
    """The one whose last use is the longest ago goes; of several used at that step, the one that came in first."""

    def __init__(self) -> None:
        self._step = 0
        # In the order in which they came in: what is used again keeps its place.
        self._last_use: dict[int, int] = {}

    def use(self, experts: Iterable[int]) -> None:
        """Note a step."""
        self._step += 1
        for expert in experts:
            if expert in self._last_use:
                self._last_use[expert] = self._step

    def add(self, expert: int) -> None:
        """Note an expert that came in."""
        self._last_use[expert] = self._step

    def remove(self, expert: int) -> None:
        """Note an expert that went."""
        del self._last_use[expert]

    def victim(self, evictable: Collection[int]) -> int:
        """Return the evictable expert whose last use is the longest ago."""
        in_order = (expert for expert in self._last_use if expert in evictable)
        return min(in_order, key=self._last_use.__getitem__)


class LFU:
    """The one used in the fewest steps goes, ever since the beginning; of equals, the least recently used one.

    What leaves its slot keeps its count.
    """

    def __init__(self) -> None:
        self._n_uses: Counter[int] = Counter()
        self._by_age = LRU()

    def use(self, experts: Iterable[int]) -> None:
        """Note a step."""
        chosen = list(experts)
        self._n_uses.update(chosen)
        self._by_age.use(chosen)

    def add(self, expert: int) -> None:
        """Note an expert that came in."""
        self._by_age.add(expert)

    def remove(self, expert: int) -> None:
        """Note an expert that went."""
        self._by_age.remove(expert)

    def victim(self, evictable: Collection[int]) -> int:
        """Return the evictable expert that the fewest steps used."""
        fewest = min(self._n_uses[expert] for expert in evictable)
        return self._by_age.victim([expert for expert in evictable if self._n_uses[expert] == fewest])


class Random:
    """Any one goes: what a policy that knows nothing achieves. The same seed gives the same choices."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # a choice of slots, no secret

    def use(self, experts: Iterable[int]) -> None:
        """Do nothing."""

    def add(self, expert: int) -> None:
        """Do nothing."""

    def remove(self, expert: int) -> None:
        """Do nothing."""

    def victim(self, evictable: Collection[int]) -> int:
        """Return one of the evictable experts."""
        return self._random.choice(sorted(evictable))


class Belady:
    """The one whose next use is the furthest ahead goes; of several that are never used again, the lowest.

    `future` is every step's experts from now on, in order; use() is called for each of them and for nothing else.
    """

    def __init__(self, future: Sequence[Iterable[int]]) -> None:
        self._n_steps_ahead = len(future)
        self._step = 0
        self._uses: dict[int, list[int]] = {}
        for step, experts in enumerate(future):
            for expert in experts:
                self._uses.setdefault(expert, []).append(step)

    def use(self, experts: Iterable[int]) -> None:  # noqa: ARG002  # they are known
        """Note that the next step has come."""
        self._step += 1

    def add(self, expert: int) -> None:
        """Do nothing."""

    def remove(self, expert: int) -> None:
        """Do nothing."""

    def victim(self, evictable: Collection[int]) -> int:
        """Return the evictable expert whose next use is the furthest ahead."""
        return max(sorted(evictable), key=self._next_use)

    def _next_use(self, expert: int) -> int:
        uses = self._uses.get(expert, [])
        next_use = bisect_left(uses, self._step)
        return uses[next_use] if next_use < len(uses) else self._n_steps_ahead
