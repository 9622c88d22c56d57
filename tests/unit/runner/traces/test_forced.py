"""A recorded routing in the gates' place: decode tokens choose as recorded, and guesses are right as often as said."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from quant.segment import Step
from runner.errors import ConfigInvalid
from runner.traces.errors import TraceInvalid
from runner.traces.forced import ForcedRouting
from runner.traces.record import DECODE, Trace, TraceShape
from tests.unit.runner.traces.traces import random_trace

TRACE = random_trace(40)
SHAPE = TRACE.shape
DECODED = [token for token in TRACE.tokens if token.phase == DECODE]


def step_of(n_tokens: int) -> Step:
    ids = torch.zeros(n_tokens, SHAPE.top_k, dtype=torch.int64)
    weights = torch.zeros(n_tokens, SHAPE.top_k)
    return cast("Step", SimpleNamespace(expert_ids=ids, expert_weights=weights))


def test_each_decoded_token_chooses_what_was_recorded_in_each_layer() -> None:
    forced = ForcedRouting(TRACE, SHAPE, n_prefill_tokens=3)
    prefill = step_of(3)
    for layer in range(SHAPE.n_layers):
        forced.route(layer, prefill)

    for token in DECODED[:5]:
        for layer in range(SHAPE.n_layers):
            step = step_of(1)
            forced.route(layer, step)

            assert tuple(step.expert_ids[0].tolist()) == token.expert_ids[layer]
            assert step.expert_weights.sum().item() == pytest.approx(1.0, abs=1e-3)


def test_a_prefill_ends_with_the_traces_last_tokens() -> None:
    forced = ForcedRouting(TRACE, SHAPE, n_prefill_tokens=4)
    step = step_of(4)

    forced.route(0, step)

    assert [tuple(row) for row in step.expert_ids.tolist()] == [token.expert_ids[0] for token in DECODED[-4:]]


@pytest.mark.parametrize("recall", [0.0, 0.7, 0.88, 1.0])
def test_guesses_are_right_as_often_as_was_said(recall: float) -> None:
    forced = ForcedRouting(TRACE, SHAPE, n_prefill_tokens=0, recall=recall)
    n_named = n_chosen = 0
    for place in range(600):
        token = DECODED[place % len(DECODED)]
        forced.route(0, step_of(1))
        for layer in range(SHAPE.n_layers - 1):
            ((ahead, guess),) = forced.guesses(layer, torch.empty(0))
            named = set(guess()[0].tolist())

            assert (ahead, len(named)) == (layer + 1, 2)
            n_named += len(named.intersection(token.expert_ids[ahead]))
            n_chosen += SHAPE.top_k

    assert n_named / n_chosen == pytest.approx(recall, abs=0.03)


def test_behind_the_last_layer_nothing_is_guessed() -> None:
    forced = ForcedRouting(TRACE, SHAPE, n_prefill_tokens=0)
    forced.route(0, step_of(1))

    assert list(forced.guesses(SHAPE.n_layers - 1, torch.empty(0))) == []


def test_a_model_of_fewer_layers_is_routed_by_the_traces_first() -> None:
    forced = ForcedRouting(TRACE, TraceShape(1, SHAPE.n_experts, SHAPE.top_k), n_prefill_tokens=0)
    step = step_of(1)

    forced.route(0, step)

    assert tuple(step.expert_ids[0].tolist()) == DECODED[0].expert_ids[0]


@pytest.mark.parametrize("shape", [TraceShape(99, 8, 2), TraceShape(2, 16, 2), TraceShape(2, 8, 3)])
def test_a_trace_of_another_model_is_refused(shape: TraceShape) -> None:
    with pytest.raises(TraceInvalid, match=r"a trace of .* is expected; it has"):
        ForcedRouting(TRACE, shape, n_prefill_tokens=0)


def test_a_trace_without_decode_tokens_is_refused() -> None:
    with pytest.raises(TraceInvalid, match="no decode tokens"):
        ForcedRouting(Trace(SHAPE, ()), SHAPE, n_prefill_tokens=0)


def test_a_recall_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"recall: a number from 0 to 1 is expected, 1\.5 came"):
        ForcedRouting(TRACE, SHAPE, n_prefill_tokens=0, recall=1.5)
