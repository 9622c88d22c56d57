"""Guesses counted against the truth: by state, by depth, by how many are guessed."""

import pytest
import torch
from torch import Tensor

from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER, Recall, recall_by_chance
from runner.traces.recall_tally import RecallTally
from runner.traces.record import TraceShape
from tests.unit.runner.traces.steps import N_EXPERTS, first_numbers, one_hot

SHAPE = TraceShape(n_layers=3, n_experts=N_EXPERTS, top_k=2)
# Four of eight, so that the counts are short to write: the share among the first 1, 2, 3, 4 guessed.
NARROW = TraceShape(n_layers=3, n_experts=4, top_k=2)


def four_numbers(hidden_states: Tensor) -> Tensor:
    return hidden_states[:, :4].contiguous()


def both(after_attention: Tensor, after_layer: Tensor) -> dict[str, Tensor]:
    return {AFTER_ATTENTION: after_attention, AFTER_LAYER: after_layer}


def nothing(n_tokens: int) -> dict[str, Tensor]:
    return both(torch.zeros(n_tokens, 64), torch.zeros(n_tokens, 64))


def test_a_guess_is_counted_against_the_layer_it_is_for() -> None:
    tally = RecallTally(NARROW, [four_numbers] * 3)

    # Of equal logits the lower expert comes first: 2, 0, 1, 3 are guessed from one state, 0, 1, 2, 3 from the other.
    tally.see(0, torch.tensor([[0, 1]]), both(one_hot(2), torch.zeros(1, 64)))
    tally.see(1, torch.tensor([[2, 3]]), nothing(1))
    tally.see(2, torch.tensor([[1, 0]]), nothing(1))

    assert tally.result() == (
        Recall(AFTER_ATTENTION, 1, ((0.5 + 0.5) / 2, (0.5 + 1) / 2, (0.5 + 1) / 2, 1.0)),
        Recall(AFTER_ATTENTION, 2, (0.0, 0.5, 1.0, 1.0)),
        Recall(AFTER_LAYER, 1, ((0 + 0.5) / 2, (0 + 1) / 2, (0.5 + 1) / 2, 1.0)),
        Recall(AFTER_LAYER, 2, (0.5, 1.0, 1.0, 1.0)),
    )


def test_every_token_counts() -> None:
    tally = RecallTally(NARROW, [four_numbers] * 3, depth_max=1)

    tally.see(0, torch.tensor([[0, 1], [0, 1]]), both(one_hot(3, 2), one_hot(3, 3)))
    tally.see(1, torch.tensor([[3, 0], [3, 0]]), nothing(2))

    assert tally.result() == (
        Recall(AFTER_ATTENTION, 1, (0.25, 0.75, 0.75, 1.0)),
        Recall(AFTER_LAYER, 1, (0.5, 1.0, 1.0, 1.0)),
    )


def test_the_gate_of_the_layer_ahead_is_asked() -> None:
    asked: list[int] = []

    def gate(layer: int, states: Tensor) -> Tensor:
        asked.append(layer)
        return first_numbers(states)

    gates = [lambda states, layer=layer: gate(layer, states) for layer in range(3)]
    tally = RecallTally(SHAPE, gates)

    tally.see(0, torch.tensor([[0, 1]]), nothing(1))
    tally.see(1, torch.tensor([[0, 1]]), nothing(1))
    tally.see(2, torch.tensor([[0, 1]]), nothing(1))

    assert asked == [1, 1, 2, 2, 2, 2]


def test_a_step_that_was_not_finished_leaves_no_guesses() -> None:
    tally = RecallTally(SHAPE, [first_numbers] * 3)
    tally.see(0, torch.tensor([[0, 1], [0, 1]]), nothing(2))

    for layer in range(3):
        tally.see(layer, torch.tensor([[0, 1]]), nothing(1))

    assert [recall.ratios[:2] for recall in tally.result()] == [(0.5, 1.0)] * 4


def test_nothing_seen_is_no_recall_and_one_layer_has_none_ahead() -> None:
    unused, shallow = RecallTally(SHAPE, [first_numbers] * 3), RecallTally(TraceShape(1, 8, 2), [first_numbers])
    shallow.see(0, torch.tensor([[0, 1]]), nothing(1))

    recalls = (unused.result(), shallow.result())

    assert recalls == ((), ())


def test_guesses_that_know_nothing_have_the_recall_of_chance() -> None:
    torch.manual_seed(0)
    tally = RecallTally(SHAPE, [first_numbers] * 3)

    for layer in range(3):
        expert_ids = torch.rand(2000, N_EXPERTS).topk(2).indices
        tally.see(layer, expert_ids, both(torch.randn(2000, 64), torch.randn(2000, 64)))

    for recall in tally.result():
        # 4,000 experts at least: a standard deviation is 0.008 at most.
        assert recall.ratios == pytest.approx([recall_by_chance(SHAPE, n) for n in range(1, 9)], abs=0.03)
