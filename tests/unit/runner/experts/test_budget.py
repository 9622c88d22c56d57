"""Slots from a budget: what is counted, what is the least, and that nothing usable is left over."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigInvalid
from runner.experts.budget import FixedMemory, SlotNeeds, SlotPlan, plan_slots

NEEDS = SlotNeeds(n_layers=4, n_experts=8, top_k=2, slot_nbytes=1000, n_spares=3)
FIXED = FixedMemory(dense_weights_nbytes=5000, kv_cache_nbytes=600, workspace_nbytes=70, staging_nbytes=8)
LEAST_NBYTES = 5678 + (4 * 2 + 3) * 1000


def test_a_number_of_experts_is_every_layers() -> None:
    plan = plan_slots(NEEDS, FIXED, cache_experts=5)

    assert plan == SlotPlan(quotas=(5, 5, 5, 5), n_spares=3, nbytes=5678 + 23 * 1000)


@pytest.mark.parametrize("cache_experts", [1, 9, 0, -1])
def test_fewer_than_a_token_needs_or_more_than_there_are_is_refused(cache_experts: int) -> None:
    with pytest.raises(ConfigInvalid, match=rf"--cache-experts: 2 .* to 8 .* are expected, {cache_experts} came"):
        plan_slots(NEEDS, FIXED, cache_experts=cache_experts)


def test_what_does_not_divide_evenly_goes_to_the_first_layers() -> None:
    plan = plan_slots(NEEDS, FIXED, device_memory_nbytes=LEAST_NBYTES + 3 * 1000 + 999)

    assert plan == SlotPlan(quotas=(3, 3, 3, 2), n_spares=3, nbytes=LEAST_NBYTES + 3 * 1000)


def test_more_memory_than_all_experts_need_is_left_alone() -> None:
    plan = plan_slots(NEEDS, FIXED, device_memory_nbytes=1 << 40)

    assert plan.quotas == (8, 8, 8, 8)


def test_the_least_budget_gives_each_layer_what_a_token_needs() -> None:
    plan = plan_slots(NEEDS, FIXED, device_memory_nbytes=LEAST_NBYTES)

    assert plan == SlotPlan(quotas=(2, 2, 2, 2), n_spares=3, nbytes=LEAST_NBYTES)


@pytest.mark.parametrize("missing_nbytes", [1, LEAST_NBYTES - 5000, LEAST_NBYTES])
def test_a_budget_too_small_is_refused_with_the_least_and_what_it_consists_of(missing_nbytes: int) -> None:
    came = LEAST_NBYTES - missing_nbytes

    with pytest.raises(ConfigInvalid) as refused:
        plan_slots(NEEDS, FIXED, device_memory_nbytes=came)

    assert re.match(rf"--device-memory: at least {LEAST_NBYTES} bytes .* are needed, {came} ", str(refused.value))
    for counted in ("weights 5000", "kv_cache 600", "workspace 70", "staging 8", "8 + 3 spare slots of 1000 bytes"):
        assert counted in str(refused.value)


def test_the_gigabytes_that_are_said_to_be_enough_are() -> None:
    needs = SlotNeeds(n_layers=1, n_experts=2, top_k=1, slot_nbytes=(1 << 30) + 1, n_spares=1)

    with pytest.raises(
        ConfigInvalid, match=r"2147483650 bytes \(2\.01 GiB\) are needed, 2147483649 \(2\.00 GiB\) came"
    ):
        plan_slots(needs, FixedMemory(0, 0, 0, 0), device_memory_nbytes=(2 << 30) + 1)


@pytest.mark.parametrize(
    ("options", "came"), [({}, "neither"), ({"cache_experts": 2, "device_memory_nbytes": 9}, "both")]
)
def test_exactly_one_of_the_options_is_taken(options: dict[str, int], came: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"exactly one of --cache-experts and --device-memory is expected, {came}"):
        plan_slots(NEEDS, FIXED, **options)


@given(
    n_layers=st.integers(1, 40),
    n_experts=st.integers(1, 20),
    slot_nbytes=st.integers(1, 5000),
    n_spares=st.integers(0, 5),
    more_nbytes=st.integers(0, 10**6),
)
def test_the_budget_is_used_up_and_never_passed(
    n_layers: int, n_experts: int, slot_nbytes: int, n_spares: int, more_nbytes: int
) -> None:
    needs = SlotNeeds(n_layers, n_experts, (n_experts + 1) // 2, slot_nbytes, n_spares)
    budget = plan_slots(needs, FIXED, cache_experts=needs.top_k).nbytes + more_nbytes

    plan = plan_slots(needs, FIXED, device_memory_nbytes=budget)

    assert plan.nbytes == FIXED.nbytes + (sum(plan.quotas) + n_spares) * slot_nbytes <= budget
    assert max(plan.quotas) - min(plan.quotas) <= 1
    assert budget - plan.nbytes < slot_nbytes or plan.quotas == (n_experts,) * n_layers
