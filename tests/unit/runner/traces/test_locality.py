"""Locality: what neighbours share, and curves over the sizes of caches, beside chance."""

import pytest

from runner.traces.errors import TraceInvalid
from runner.traces.locality import adjacent_overlap, all_sizes, measure_locality
from runner.traces.record import Trace, TraceShape
from runner.traces.replay import replay
from tests.unit.runner.traces.traces import random_trace, trace_of_layer


def test_the_overlap_is_the_share_of_experts_that_the_token_before_chose() -> None:
    trace = trace_of_layer((0, 1), (1, 0), (1, 2), (4, 5), prefill=(0, 1))

    overlap = adjacent_overlap(trace)

    assert overlap == (2 + 1 + 0) / 6


def test_the_overlap_counts_all_layers() -> None:
    trace = random_trace(2000, n_layers=2)

    overlap = adjacent_overlap(trace)

    # 8,000 experts, a quarter of them shared by chance: a standard deviation is 0.005.
    assert overlap == pytest.approx(2 / 8, abs=0.02)


def test_a_single_token_shares_nothing_with_any_other() -> None:
    locality = measure_locality(trace_of_layer((0, 1)), ["lru"])

    assert (locality.overlap, locality.overlap_by_chance) == (None, 0.25)


def test_a_trace_without_decode_tokens_has_no_locality() -> None:
    with pytest.raises(TraceInvalid, match="no decode tokens"):
        adjacent_overlap(Trace(TraceShape(1, 8, 2), ()))


def test_a_curve_has_the_hit_ratio_of_every_size() -> None:
    trace = random_trace(60)

    locality = measure_locality(trace, ["lru", "belady"])

    assert locality.cache_experts == (2, 3, 4, 5, 6, 7)
    assert locality.uniform == (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    assert [(curve.policy, curve.ratios) for curve in locality.curves] == [
        (policy, tuple(replay(trace, policy, k).overall for k in locality.cache_experts))
        for policy in ("lru", "belady")
    ]


def test_sizes_that_are_named_are_taken() -> None:
    locality = measure_locality(random_trace(5), ["lru"], [6, 3])

    assert locality.cache_experts == (6, 3)
    assert len(locality.curves[0].ratios) == 2


@pytest.mark.parametrize("n_experts", [1, 2, 3, 8, 60, 128, 4096])
def test_there_are_some_sizes_for_every_model_and_not_too_many(n_experts: int) -> None:
    for top_k in {1, min(2, n_experts), n_experts}:
        sizes = all_sizes(TraceShape(1, n_experts, top_k))

        assert sizes[0] == top_k
        assert 1 <= len(sizes) <= 16
        assert sizes[-1] < n_experts or sizes == (n_experts,)
