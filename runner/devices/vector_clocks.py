"""Which access of a buffer is ordered after which, whatever the timing was. Knows no queue, no thread and no memory.

Whoever acts is a component: each host thread, each queue of the device. A component counts its own steps, and knows up
to which step it has seen each other one; that is its clock. Whoever is ordered after a step (a queue waits for an
event, a host thread synchronizes, work is submitted) learns the clock that stood there. An access is ordered after an
earlier one if its clock knows the step of the earlier one. Two accesses of a buffer, at least one of which writes, must
be ordered. (Mattern's vector clocks; a buffer keeps its last write and the reads since, as FastTrack does: an access
ordered after those is ordered after all.)

Clocks follow from the order in which the host called, so that a missing event is found in every run: in those, too, in
which the accesses happened to come one after the other. Nothing here is locked; the caller's lock is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from runner.devices.errors import UnorderedAccess


@dataclass(frozen=True, slots=True)
class Clock:
    """Up to which step of each component something is ordered after; a component that is missing: no step."""

    steps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def knows(self, component: str, step: int) -> bool:
        """Return whether that step of the component is among those known."""
        return self.steps.get(component, 0) >= step


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """One access of a buffer: by which component, at which of its steps, as part of what."""

    component: str
    step: int
    label: str
    writes: bool

    def __str__(self) -> str:
        return f"{self.label} of the {self.component}, which {'writes' if self.writes else 'reads'} it"


class VectorClocks:
    """The clocks of all components; one that was never heard of is at its start."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[str, int]] = {}

    def advance(self, component: str) -> Clock:
        """Take the component's next step; return its clock there."""
        steps = self._steps.setdefault(component, {})
        steps[component] = steps.get(component, 0) + 1
        return Clock(MappingProxyType(dict(steps)))

    def learn(self, component: str, clock: Clock) -> None:
        """Let the component know all that the clock knows."""
        steps = self._steps.setdefault(component, {})
        for other, step in clock.steps.items():
            steps[other] = max(steps.get(other, 0), step)


class AccessHistory:
    """The accesses of one buffer that a new one has to be ordered after.

    An access by a host thread takes a while: it is open from `begin` to `end`, and until then ordered before nothing.
    One by a queue counts as a whole, since only an event tells others of it, and the event comes after it.
    """

    def __init__(self, buffer_name: str) -> None:
        self._buffer_name = buffer_name
        self._write: Access | None = None
        self._reads: dict[str, Access] = {}  # the last one of each component since the write
        self._open: list[Access] = []

    def add(self, access: Access, clock: Clock) -> None:
        """Keep an access at that clock; raise UnorderedAccess if an earlier one is not known to it."""
        self._check(access, clock)
        self._keep(access)

    def begin(self, access: Access, clock: Clock) -> None:
        """Open an access at that clock; raise UnorderedAccess if an earlier one is not known to it."""
        self._check(access, clock)
        self._open.append(access)

    def end(self, access: Access, step: int) -> None:
        """Close an access, at that step of its component."""
        self._open.remove(access)
        self._keep(Access(access.component, step, access.label, access.writes))

    def _check(self, access: Access, clock: Clock) -> None:
        for earlier in self._open:
            if earlier.component != access.component and (earlier.writes or access.writes):
                raise UnorderedAccess(f"{self._buffer_name}: {access}, during {earlier}")
        for earlier in self._earlier(access):
            if not clock.knows(earlier.component, earlier.step):
                raise UnorderedAccess(f"{self._buffer_name}: no event orders {access}, after {earlier}")

    def _earlier(self, access: Access) -> Iterator[Access]:
        """Yield the accesses that conflict with this one."""
        if self._write is not None:
            yield self._write
        if access.writes:
            yield from self._reads.values()

    def _keep(self, access: Access) -> None:
        if access.writes:
            self._write = access
            self._reads.clear()
        else:
            self._reads[access.component] = access
