"""How much of a store stays in memory, from what it may take and what there is."""

import dataclasses
from pathlib import Path

import pytest

from expertd.budget import ALL_THERE_IS, RESERVE_NBYTES, MemoryWish, TierPlan, least_nbytes, plan_memory
from protocol.errors import OutOfMemory
from protocol.handles import ExpertKey
from protocol.layout import PAGE_NBYTES
from protocol.manifest import Manifest
from tests.support.stores import write_random_store

PLENTY = 1 << 40
KEYS = tuple(ExpertKey(layer, expert) for layer in range(2) for expert in range(4))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_random_store(tmp_path / "store")


def nbytes_of(manifest: Manifest) -> int:
    return manifest.dense_nbytes + manifest.experts_nbytes


def expert_nbytes(manifest: Manifest) -> int:
    return manifest.experts[KEYS[0]].nbytes


def with_slots(manifest: Manifest, n_slots: int, *, n_pinned: int = 0) -> int:
    """Return the budget that is just enough for so many slots."""
    return manifest.dense_nbytes + (n_slots + n_pinned) * expert_nbytes(manifest) + PAGE_NBYTES


def test_a_store_that_leaves_the_reserve_free_is_resident(manifest: Manifest) -> None:
    assert plan_memory(manifest, ALL_THERE_IS, nbytes_of(manifest) + RESERVE_NBYTES) is None


def test_a_store_that_fits_its_budget_is_resident(manifest: Manifest) -> None:
    assert plan_memory(manifest, MemoryWish(nbytes_of(manifest)), PLENTY) is None


def test_a_store_that_would_not_leave_the_reserve_free_gets_slots_in_what_there_is(manifest: Manifest) -> None:
    plan = plan_memory(manifest, ALL_THERE_IS, with_slots(manifest, 6) + RESERVE_NBYTES)

    assert plan == TierPlan(frozenset(), 6)


@pytest.mark.parametrize("n_slots", [4, 5, 6])
def test_a_budget_is_filled_with_slots_and_never_exceeded(manifest: Manifest, n_slots: int) -> None:
    exact = plan_memory(manifest, MemoryWish(with_slots(manifest, n_slots)), PLENTY)
    a_byte_less = plan_memory(manifest, MemoryWish(with_slots(manifest, n_slots + 1) - 1), PLENTY)

    assert exact == a_byte_less == TierPlan(frozenset(), n_slots)


def test_less_than_dense_weights_and_two_layers_of_a_token_is_refused_with_the_least(manifest: Manifest) -> None:
    least = with_slots(manifest, 2 * manifest.model.top_k)

    assert least_nbytes(manifest) == least
    assert plan_memory(manifest, MemoryWish(least), PLENTY) is not None
    with pytest.raises(OutOfMemory, match=r"needs at least 0\.00 GB of its 0\.00 GB in memory, 0\.00 GB are allowed"):
        plan_memory(manifest, MemoryWish(least - 1), PLENTY)


def test_a_budget_that_is_not_there_is_refused(manifest: Manifest) -> None:
    budget = with_slots(manifest, 5)

    with pytest.raises(OutOfMemory, match=r"to spare, 0\.27 GB are available; at least"):
        plan_memory(manifest, MemoryWish(budget), budget + RESERVE_NBYTES - 1)


def test_where_not_even_the_least_is_available_the_least_is_named(manifest: Manifest) -> None:
    with pytest.raises(OutOfMemory, match=r"needs 0\.00 GB and 0\.27 GB to spare, 0\.00 GB are available"):
        plan_memory(manifest, ALL_THERE_IS, 0)


def test_pinned_experts_take_at_most_half_of_what_there_is_for_experts(manifest: Manifest) -> None:
    plan = plan_memory(manifest, MemoryWish(with_slots(manifest, 6, n_pinned=1), KEYS[::-1]), PLENTY)

    assert plan == TierPlan(frozenset(KEYS[:-4:-1]), 4)


def test_pinned_experts_leave_the_least_of_slots(manifest: Manifest) -> None:
    plan = plan_memory(manifest, MemoryWish(with_slots(manifest, 4), KEYS), PLENTY)

    assert plan == TierPlan(frozenset(), 4)


def test_pinned_experts_that_the_store_has_not_are_passed_over(manifest: Manifest) -> None:
    wish = MemoryWish(with_slots(manifest, 7), (ExpertKey(9, 9), KEYS[3], KEYS[3]))

    assert plan_memory(manifest, wish, PLENTY) == TierPlan(frozenset({KEYS[3]}), 6)


def test_a_slot_is_as_long_as_the_longest_expert_that_is_not_pinned(manifest: Manifest) -> None:
    longest = dataclasses.replace(manifest.experts[KEYS[0]], nbytes=2 * expert_nbytes(manifest))
    others = {ExpertKey(layer, expert): longest for layer in (2, 3) for expert in range(4)}
    mixed = dataclasses.replace(manifest, experts=manifest.experts | others)

    plan = plan_memory(mixed, MemoryWish(with_slots(manifest, 16), tuple(others)), PLENTY)
    pins_all = plan_memory(mixed, MemoryWish(with_slots(manifest, 20), tuple(others)[:4]), PLENTY)

    assert plan == TierPlan(frozenset(tuple(others)[:4]), 4)
    assert pins_all == TierPlan(frozenset(tuple(others)[:4]), 6)


def test_a_resident_store_pins_nothing(manifest: Manifest) -> None:
    assert plan_memory(manifest, MemoryWish(None, KEYS), PLENTY) is None
