"""What a model's observer hands on: each token once, whole, in order."""

import torch

from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER
from runner.traces.recall_tally import RecallTally
from runner.traces.record import DECODE, PREFILL, TokenRouting, TraceShape
from runner.traces.recording import RoutingRecorder
from tests.unit.runner.traces.steps import HIDDEN, N_EXPERTS, TOP_K, first_numbers, new_step, one_hot

SHAPE = TraceShape(n_layers=2, n_experts=N_EXPERTS, top_k=TOP_K)
EVEN = ((0.5, 0.5), (0.5, 0.5))


def show_step(recorder: RoutingRecorder, *by_layer: list[list[int]]) -> None:
    """Let the recorder see a step in which the layers' tokens chose so."""
    for layer, expert_ids in enumerate(by_layer):
        recorder.after_layer(layer, new_step(torch.zeros(len(expert_ids), HIDDEN), expert_ids))


def test_every_token_is_handed_on_with_all_its_layers_in_the_gates_order() -> None:
    tokens: list[TokenRouting] = []
    recorder = RoutingRecorder(SHAPE, tokens.append)

    show_step(recorder, [[3, 1], [5, 7]], [[0, 2], [6, 4]])
    show_step(recorder, [[1, 0]], [[7, 6]])

    assert tokens == [
        TokenRouting(DECODE, ((3, 1), (0, 2)), EVEN),
        TokenRouting(DECODE, ((5, 7), (6, 4)), EVEN),
        TokenRouting(DECODE, ((1, 0), (7, 6)), EVEN),
    ]


def test_the_first_tokens_are_the_prefill_however_they_are_cut_into_steps() -> None:
    tokens: list[TokenRouting] = []
    recorder = RoutingRecorder(SHAPE, tokens.append, n_prefill_tokens=3)

    for n_tokens in (2, 1, 1):
        show_step(recorder, [[0, 1]] * n_tokens, [[0, 1]] * n_tokens)

    assert [token.phase for token in tokens] == [PREFILL, PREFILL, PREFILL, DECODE]


def test_a_step_that_failed_halfway_leaves_no_trace() -> None:
    tokens: list[TokenRouting] = []
    recorder = RoutingRecorder(SHAPE, tokens.append)

    show_step(recorder, [[3, 1], [5, 7]])
    show_step(recorder, [[1, 0]], [[7, 6]])

    assert tokens == [TokenRouting(DECODE, ((1, 0), (7, 6)), EVEN)]


def test_guesses_are_made_from_the_states_before_and_behind_the_experts() -> None:
    recall = RecallTally(SHAPE, [first_numbers] * 2)
    recorder = RoutingRecorder(SHAPE, lambda _: None, recall=recall)
    after_attention, added = one_hot(6), 2 * one_hot(4)

    recorder.after_layer(0, new_step(after_attention, [[0, 1]], added))
    recorder.after_layer(1, new_step(torch.zeros(1, HIDDEN), [[4, 7]]))

    # From the former state 6 is guessed, then 0, 1, 2, 3, 4; from the latter 4 and 6, then the others.
    ratios = {recalled.state: recalled.ratios for recalled in recall.result()}
    assert ratios[AFTER_ATTENTION] == (0, 0, 0, 0, 0, 0.5, 0.5, 1)
    assert ratios[AFTER_LAYER] == (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1)


def test_what_is_computed_is_left_as_it_was() -> None:
    recorder = RoutingRecorder(SHAPE, lambda _: None, recall=RecallTally(SHAPE, [first_numbers] * 2))
    hidden_states, added = one_hot(6), one_hot(4)
    step = new_step(hidden_states, [[0, 1]], added)

    recorder.after_layer(0, step)

    assert step.added is added
    assert torch.equal(step.hidden_states, one_hot(6))
    assert torch.equal(added, one_hot(4))
