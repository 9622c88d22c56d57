"""Which expert goes, by each policy; what all of them have in common, by random uses."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.experts.policies import LFU, LRU, Belady, Policy, Random

_USES = st.lists(st.sets(st.integers(0, 7), min_size=2, max_size=2).map(sorted), min_size=1, max_size=40)


def filled(policy: Policy, *experts: int) -> None:
    for expert in experts:
        policy.add(expert)


def count_misses(policy: Policy, steps: list[list[int]], n_slots: int) -> int:
    """Return how many experts had to be fetched, from empty slots on; a victim is never one that the step uses."""
    cached: set[int] = set()
    n_misses = 0
    for step in steps:
        policy.use(step)
        for expert in step:
            if expert in cached:
                continue
            n_misses += 1
            if len(cached) == n_slots:
                victim = policy.victim(cached - set(step))
                cached.remove(victim)
                policy.remove(victim)
            cached.add(expert)
            policy.add(expert)
    return n_misses


def least_misses(steps: list[list[int]], n_slots: int) -> int:
    """Return the fewest misses that any choice of victims has: all of them are tried."""
    reached = {frozenset[int](): 0}
    for step in steps:
        after: dict[frozenset[int], int] = {}
        for cached, n_misses in reached.items():
            missing = set(step) - cached
            states = [cached | missing]
            while len(states[0]) > n_slots:
                states = [state - {victim} for state in states for victim in state - set(step)]
            for state in states:
                after[state] = min(after.get(state, len(steps) * 9), n_misses + len(missing))
        reached = after
    return min(reached.values())


def test_lru_evicts_what_was_used_the_longest_ago() -> None:
    policy = LRU()
    filled(policy, 0, 1, 2)

    policy.use([0])
    policy.use([2, 1])

    assert policy.victim({0, 1, 2}) == 0


def test_lru_evicts_the_one_that_came_in_first_of_those_used_at_one_step() -> None:
    policy = LRU()
    filled(policy, 5, 3, 4)

    policy.use([3, 4, 5])

    assert policy.victim({3, 4, 5}) == 5


def test_coming_in_counts_as_a_use() -> None:
    policy = LRU()
    filled(policy, 0)
    policy.use([1])
    filled(policy, 2)

    victim = policy.victim({0, 2})

    assert victim == 0


def test_lru_takes_what_came_in_again_as_new() -> None:
    policy = LRU()
    filled(policy, 0, 1)
    policy.remove(0)
    filled(policy, 0)

    victim = policy.victim({0, 1})

    assert victim == 1


def test_lru_evicts_only_what_it_may() -> None:
    policy = LRU()
    filled(policy, 0, 1, 2)

    victim = policy.victim([2, 1])

    assert victim == 1


def test_lfu_evicts_what_the_fewest_steps_used() -> None:
    policy = LFU()
    filled(policy, 0, 1)
    for step in ([0], [0], [1]):
        policy.use(step)

    victim = policy.victim({0, 1})

    assert victim == 1


def test_lfu_remembers_the_uses_of_what_was_evicted() -> None:
    policy = LFU()
    filled(policy, 0)
    for _ in range(3):
        policy.use([0])
    policy.remove(0)
    filled(policy, 1, 0)
    policy.use([1])

    victim = policy.victim({0, 1})

    assert victim == 1


def test_lfu_evicts_the_least_recently_used_of_equals() -> None:
    policy = LFU()
    filled(policy, 0, 1)
    policy.use([1])
    policy.use([0])

    victim = policy.victim({0, 1})

    assert victim == 1


def test_belady_evicts_what_is_needed_last() -> None:
    policy = Belady([[0, 1], [1, 2], [2, 0], [1, 2]])
    policy.use([0, 1])

    victim = policy.victim({0, 1, 2})

    assert victim == 0


def test_belady_evicts_what_is_never_needed_before_what_is() -> None:
    policy = Belady([[0], [1], [0]])
    policy.use([0])
    policy.use([1])

    victim = policy.victim({0, 1})

    assert victim == 1


def test_a_seed_repeats_its_random_victims() -> None:
    first, again, other = Random(1), Random(1), Random(2)
    evictable = set(range(8))

    victims = [[policy.victim(evictable) for _ in range(20)] for policy in (first, again, other)]

    assert victims[0] == victims[1] != victims[2]
    assert set(victims[0]) <= evictable


@given(steps=_USES, n_slots=st.integers(2, 5))
def test_no_choice_of_victims_misses_less_than_belady(steps: list[list[int]], n_slots: int) -> None:
    steps = steps[:12]

    n_misses = count_misses(Belady(steps), steps, n_slots)

    assert n_misses == least_misses(steps, n_slots)


@pytest.mark.parametrize("new_policy", [LRU, LFU])
@given(steps=_USES, n_slots=st.integers(2, 7))
def test_every_victim_is_among_those_that_may_go(
    new_policy: type[LRU | LFU], steps: list[list[int]], n_slots: int
) -> None:
    shuffled = random.Random(0)

    class Checked(new_policy):  # type: ignore[valid-type, misc]
        def victim(self, evictable: set[int]) -> int:
            candidates = sorted(evictable)
            shuffled.shuffle(candidates)
            chosen: int = super().victim(candidates)
            assert chosen in evictable
            assert chosen == super().victim(evictable), "the order in which candidates are named says nothing"
            return chosen

    n_misses = count_misses(Checked(), steps, n_slots)

    assert n_misses >= least_misses(steps[:1], n_slots)
