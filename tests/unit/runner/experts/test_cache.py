"""Experts on a device return the same bits as experts in place, whatever the cache, the prefetches and the timing."""

import pytest
import torch
from torch import Tensor

from quant.library import has_c_library
from runner.experts.cache import CacheMode
from tests.unit.runner.experts.rehearsal import (
    GUESSES,
    Step,
    computed_in_place,
    random_steps,
    rehearse,
    settings_of,
)
from tests.unit.runner.experts.tiny_store import N_EXPERTS, RECORD_NBYTES


def assert_same_bits(outputs: list[Tensor], steps: list[Step]) -> None:
    for output, expected in zip(outputs, computed_in_place(steps), strict=True):
        # torch, which computes without the library, groups tokens and rounds otherwise.
        assert torch.allclose(output, expected, rtol=0, atol=0 if has_c_library() else 1e-5)


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("guess", GUESSES)
def test_any_number_of_slots_any_prefetch_and_any_timing_give_the_same_bits(k: int, guess: str) -> None:
    for seed in range(100 * k, 100 * k + 12):
        steps = random_steps(seed)

        rehearsed = rehearse(seed, steps, settings_of(seed, k), guess)

        assert_same_bits(rehearsed.outputs, steps)


@pytest.mark.parametrize("mode", [CacheMode.UNCACHED, CacheMode.NAIVE])
@pytest.mark.parametrize("guess", ["none", "random"])
def test_without_a_cache_the_bits_are_the_same(mode: CacheMode, guess: str) -> None:
    for seed in range(20):
        steps = random_steps(seed)

        rehearsed = rehearse(seed, steps, settings_of(seed, 2 + seed % 7, mode), guess)

        assert_same_bits(rehearsed.outputs, steps)
        assert rehearsed.counters.hits == 0


def test_a_naive_cache_copies_every_expert_of_every_layer_it_computes() -> None:
    steps = random_steps(0, prefills=False)

    counters = rehearse(0, steps, settings_of(0, 4, CacheMode.NAIVE)).counters

    assert counters.copied_nbytes == len(steps) * N_EXPERTS * RECORD_NBYTES


def test_prefetching_changes_neither_hits_nor_misses_nor_evictions() -> None:
    steps = random_steps(3, 20)
    settings = settings_of(3, 3)

    counted = [rehearse(3, steps, settings, guess).counters for guess in GUESSES]

    assert len({(counters.hits, counters.misses, counters.evictions) for counters in counted}) == 1


def test_right_prefetches_are_used_and_wrong_ones_cancelled_or_wasted() -> None:
    steps = random_steps(3, 20, prefills=False)
    settings = settings_of(3, 3)

    right, wrong = (rehearse(3, steps, settings, guess).counters for guess in ("right", "wrong"))

    assert right.prefetches_used == right.prefetches_issued > 0
    assert wrong.prefetches_used == 0
    assert wrong.prefetches_cancelled + wrong.prefetches_wasted == wrong.prefetches_issued > 0


def test_with_a_slot_for_every_expert_each_is_copied_once() -> None:
    steps = random_steps(1, 20)

    counters = rehearse(1, steps, settings_of(1, N_EXPERTS)).counters

    used = {(step.layer, expert) for step in steps for expert in step.experts}
    assert counters.copied_nbytes == len(used) * RECORD_NBYTES
    assert counters.evictions == 0
