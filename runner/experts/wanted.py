"""Which of a call's experts are launched next. Pure: knows no device and no table, only how far each expert's copy is.

An expert passes through these places, though it may begin in any of them, and leaves the last one when it is taken to
be launched:

    missing     it has no slot yet
    pending     its copy was asked for
    coming      its copy was submitted: whatever waits for the slot's `ready` waits for it
    ready       it is there

What is there is launched at once, the others one by one in the order of their copies, so that one is computed while the
next is copied. The naive way (`all_at_once`) copies first, as much as there are slots for.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Awaited:
    """A slot that was taken while it was being copied, and the one that was taken last before it, if there was one."""

    slot: int
    before: int | None


@dataclass(slots=True, eq=False)
class Wanted:
    """A call's experts that are not launched yet: expert → slot, in the order of their copies."""

    layer: int
    all_at_once: bool = False
    missing: deque[int] = field(default_factory=deque)
    pending: dict[int, int] = field(default_factory=dict)
    coming: dict[int, int] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)
    awaited: list[Awaited] = field(default_factory=list)
    _last: int | None = None

    @property
    def is_submitted(self) -> bool:
        """Return whether no copy is left to be submitted."""
        return not self.pending and not self.missing

    @property
    def is_taken(self) -> bool:
        """Return whether everything was taken."""
        return self.is_submitted and not self.coming and not self.ready

    @property
    def may_launch(self) -> bool:
        """Return whether there is something to take."""
        return bool(self.ready or self.coming) and not (self.all_at_once and self.pending)

    def collect(self, is_submitted: Callable[[int], bool]) -> None:
        """Move those whose slots' copies were submitted from `pending` to `coming`."""
        for expert in [expert for expert, slot in self.pending.items() if is_submitted(slot)]:
            self.coming[expert] = self.pending.pop(expert)

    def take(self) -> dict[int, int]:
        """Take away and return what to launch next, nothing if nothing may be."""
        if not self.may_launch:
            return {}
        taken, self.ready = self.ready, {}
        while self.coming and (self.all_at_once or not taken):
            expert = next(iter(self.coming))
            taken[expert] = self.coming.pop(expert)
            self.awaited.append(Awaited(taken[expert], self._last))
        self._last = next(reversed(taken.values()))
        return taken
