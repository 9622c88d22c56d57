"""Policies on traces: hits counted by hand, bounds that always hold, and the known figures of a real trace."""

from pathlib import Path

import pytest

from runner.errors import ConfigInvalid
from runner.traces.errors import TraceInvalid
from runner.traces.reader import read_trace
from runner.traces.record import Trace
from runner.traces.replay import POLICIES, HitRatio, replay
from tests.unit.runner.traces.traces import random_trace, trace_of_layer

# 773 tokens of Mixtral-8x7B-Instruct behind one prompt, which is no part of this repository.
REAL_TRACE = Path(__file__).parents[5] / "shared" / "data" / "mixtral_8x7b_instruct_routing.txt"


@pytest.fixture(scope="module")
def real_trace() -> Trace:
    if not REAL_TRACE.exists():
        pytest.skip(f"{REAL_TRACE.name} is not there; a recorded trace of another model has other figures")
    return read_trace(REAL_TRACE)


@pytest.mark.parametrize(
    ("policy", "cache_experts", "known"),
    [
        *(("lru", k, known) for k, known in enumerate((0.327, 0.451, 0.573, 0.689, 0.801, 0.905), start=2)),
        *(("belady", k, known) for k, known in enumerate((0.327, 0.574, 0.722, 0.824, 0.901, 0.959), start=2)),
        *(("lfu", k, known) for k, known in enumerate((0.327, 0.465, 0.591, 0.708, 0.816, 0.915), start=2)),
    ],
)
def test_the_hit_ratios_of_the_real_trace_are_the_known_ones(
    real_trace: Trace, policy: str, cache_experts: int, known: float
) -> None:
    hit_ratio = replay(real_trace, policy, cache_experts).overall

    # The known figures have three digits; which of equals LFU evicts is not known of its.
    assert hit_ratio == pytest.approx(known, abs=0.0006 if policy != "lfu" else 0.001)


def test_random_choices_on_the_real_trace_are_as_good_as_known(real_trace: Trace) -> None:
    hit_ratios = [replay(real_trace, "random", 4, seed=seed).overall for seed in range(3)]

    assert hit_ratios == pytest.approx([0.569] * 3, abs=0.005)
    assert len(set(hit_ratios)) > 1


def test_a_step_is_looked_up_before_its_misses_are_fetched() -> None:
    trace = trace_of_layer((0, 1), (2, 0), (1, 0), (0, 1))

    hit_ratio = replay(trace, "lru", 2)

    assert hit_ratio == HitRatio(n_hits=(4,), n_lookups=8)
    assert (hit_ratio.overall, hit_ratio.by_layer) == (0.5, (0.5,))


def test_what_a_step_needs_is_not_evicted_for_it() -> None:
    # 1 came in first and is the least recently used; it stays for the step that needs it.
    trace = trace_of_layer((1, 2), (3, 2), (1, 4), (1, 4))

    hits = replay(trace, "lru", 3).n_hits

    assert hits == (1 + 1 + 2,)


def test_the_last_of_a_prefills_experts_are_there_for_the_first_token_and_are_not_counted() -> None:
    warm = trace_of_layer((6, 7), prefill=(7, 6, 5, 0, 1))
    gone = trace_of_layer((0, 1), prefill=(7, 6, 5, 0, 1))

    hits = [replay(trace, policy, 2).n_hits for trace in (warm, gone) for policy in POLICIES]

    assert hits == [(2,)] * len(POLICIES) + [(0,)] * len(POLICIES)


def test_each_layer_has_slots_of_its_own() -> None:
    trace = random_trace(50, n_layers=3)
    alone = [trace_of_layer(*(token.expert_ids[layer] for token in trace.tokens)) for layer in range(3)]

    hits = replay(trace, "lru", 4).n_hits

    assert hits == tuple(replay(layer, "lru", 4).n_hits[0] for layer in alone)
    assert len(set(hits)) > 1


@pytest.mark.parametrize("cache_experts", range(2, 8))
def test_belady_bounds_every_policy_and_where_chance_chooses_all_are_chance(cache_experts: int) -> None:
    trace = random_trace(400, seed=cache_experts)

    hit_ratios = {policy: replay(trace, policy, cache_experts).overall for policy in POLICIES}

    assert all(hit_ratios["belady"] >= hit_ratio for hit_ratio in hit_ratios.values())
    for policy in ("lru", "lfu", "random"):
        # 2,400 lookups, k / 8 of them hits by chance: a standard deviation is 0.01 at most.
        assert hit_ratios[policy] == pytest.approx(cache_experts / 8, abs=0.04)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_slot_for_every_expert_each_is_missed_once(policy: str) -> None:
    trace = random_trace(200)

    hit_ratio = replay(trace, policy, 8)

    assert hit_ratio.n_hits == (200 * 2 - 8,) * 3


@pytest.mark.parametrize("cache_experts", [1, 9])
def test_too_few_slots_for_a_token_or_more_than_experts_are_refused(cache_experts: int) -> None:
    with pytest.raises(ConfigInvalid, match=f"--cache-experts: 2 .* to 8 .* are expected, {cache_experts} came"):
        replay(random_trace(1), "lru", cache_experts)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="one of lru, lfu, random, belady is expected, 'fifo' came"):
        replay(random_trace(1), "fifo", 2)


def test_a_trace_of_a_prefill_alone_has_nothing_to_count() -> None:
    trace = trace_of_layer((0, 1), prefill=(0, 1))

    with pytest.raises(TraceInvalid, match="no decode tokens"):
        replay(Trace(trace.shape, trace.tokens[:1]), "lru", 2)
