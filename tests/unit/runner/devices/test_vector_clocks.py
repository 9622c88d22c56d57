from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.devices.errors import UnorderedAccess
from runner.devices.vector_clocks import Access, AccessHistory, Clock, VectorClocks

COMPONENTS = ("host", "copies", "compute")


class Trace:
    """One buffer and three components."""

    def __init__(self) -> None:
        self.clocks = VectorClocks()
        self.history = AccessHistory("slot 3")

    def access(self, component: str, *, writes: bool) -> None:
        clock = self.clocks.advance(component)
        self.history.add(Access(component, clock.steps[component], "work", writes), clock)

    def order(self, earlier: str, later: str) -> None:
        """Let one component know all that the other one did."""
        self.clocks.learn(later, self.clocks.advance(earlier))


@dataclass(frozen=True)
class Step:
    """What a component does: it reads, writes, or learns what an earlier step knew."""

    component: str
    does: str
    source: int = 0


def accesses_are_ordered(steps: list[Step]) -> bool:
    """Return whether each two conflicting accesses are connected, by search in the graph of all steps."""
    before: list[set[int]] = []
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        known: set[int] = set()
        for source in [last.get(step.component), step.source if step.does == "learn" else None]:
            if source is not None and source < number:
                known |= before[source] | {source}
        before.append(known)
        last[step.component] = number
    accesses = [number for number, step in enumerate(steps) if step.does != "learn"]
    return all(
        earlier in before[later]
        for later in accesses
        for earlier in accesses
        if earlier < later and "write" in (steps[earlier].does, steps[later].does)
    )


def accesses_are_accepted(steps: list[Step]) -> bool:
    """Return whether the history accepts the accesses."""
    clocks = VectorClocks()
    history = AccessHistory("buffer")
    after: list[Clock] = []
    for number, step in enumerate(steps):
        if step.does == "learn" and step.source < number:
            clocks.learn(step.component, after[step.source])
        clock = clocks.advance(step.component)
        after.append(clock)
        if step.does != "learn":
            access = Access(step.component, clock.steps[step.component], "work", step.does == "write")
            try:
                history.add(access, clock)
            except UnorderedAccess:
                return False
    return True


def test_a_read_that_nothing_orders_after_a_write_is_refused_with_both_named() -> None:
    trace = Trace()
    trace.access("copies", writes=True)

    with pytest.raises(
        UnorderedAccess,
        match="slot 3: no event orders work of the compute, which reads it, after work of the copies, which writes it",
    ):
        trace.access("compute", writes=False)


def test_a_write_that_nothing_orders_after_a_read_is_refused() -> None:
    trace = Trace()
    trace.access("compute", writes=False)

    with pytest.raises(UnorderedAccess, match=r"which writes it, after .* which reads it"):
        trace.access("copies", writes=True)


def test_who_learned_the_clock_of_an_access_may_follow_it() -> None:
    trace = Trace()
    trace.access("copies", writes=True)
    trace.order("copies", "compute")

    trace.access("compute", writes=True)


def test_what_is_learned_goes_on_to_whoever_learns_from_the_learner() -> None:
    trace = Trace()
    trace.access("copies", writes=True)
    trace.order("copies", "compute")
    trace.order("compute", "host")

    trace.access("host", writes=False)


def test_an_access_behind_the_clock_that_was_learned_is_not_known() -> None:
    trace = Trace()
    trace.order("copies", "compute")
    trace.access("copies", writes=True)

    with pytest.raises(UnorderedAccess):
        trace.access("compute", writes=False)


def test_reads_need_no_order_among_themselves() -> None:
    trace = Trace()

    for component in COMPONENTS:
        trace.access(component, writes=False)


def test_a_write_must_be_ordered_after_every_reader() -> None:
    trace = Trace()
    trace.access("host", writes=False)
    trace.access("compute", writes=False)
    trace.order("host", "copies")

    with pytest.raises(UnorderedAccess, match="after work of the compute"):
        trace.access("copies", writes=True)


def test_a_component_follows_itself() -> None:
    trace = Trace()

    for writes in (True, False, True, True):
        trace.access("copies", writes=writes)


def test_an_access_that_is_not_over_is_before_nothing() -> None:
    trace = Trace()
    clock = trace.clocks.advance("host")
    trace.history.begin(Access("host", clock.steps["host"], "host_write", writes=True), clock)
    trace.order("host", "copies")

    with pytest.raises(UnorderedAccess, match="work of the copies, which reads it, during host_write of the host"):
        trace.access("copies", writes=False)


def test_an_access_counts_from_its_end() -> None:
    trace = Trace()
    clock = trace.clocks.advance("host")
    access = Access("host", clock.steps["host"], "host_write", writes=True)
    trace.history.begin(access, clock)
    trace.order("host", "copies")
    trace.history.end(access, trace.clocks.advance("host").steps["host"])

    with pytest.raises(UnorderedAccess, match="no event orders"):
        trace.access("copies", writes=False)

    trace.order("host", "copies")
    trace.access("copies", writes=False)


@given(
    st.lists(
        st.builds(
            Step,
            st.sampled_from(COMPONENTS),
            st.sampled_from(("read", "write", "learn", "learn")),
            st.integers(0, 11),
        ),
        max_size=12,
    )
)
def test_exactly_the_accesses_are_refused_that_no_path_of_steps_connects(steps: list[Step]) -> None:
    assert accesses_are_accepted(steps) == accesses_are_ordered(steps)
