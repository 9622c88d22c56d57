"""Those who know what will be chosen know it as often as they should; what was read and foreseen is counted a token."""

from dataclasses import replace

import pytest
import torch

from benchmarks.foreseeing import Choices, Decoded, Oracle
from quant.segment import Step
from runner.experts.counters import Tally

N_EXPERTS = 8
CHOICES: Choices = [[[(token + layer) % 8, (token + layer + 3) % 8] for layer in range(4)] for token in range(50)]


def guessed(*, recall: float, depth: int) -> dict[tuple[int, int, int], list[int]]:
    """Return what is guessed by token, guessing layer and guessed layer."""
    oracle = Oracle(CHOICES, N_EXPERTS, depth=depth, recall=recall)
    step = Step.__new__(Step)
    guesses = {}
    for token in range(len(CHOICES)):
        for layer in range(4):
            oracle.route(layer, step)
            for ahead, guess in oracle.guesses(layer, torch.empty(0)):
                guesses[token, layer, ahead] = guess()[0].tolist()
    return guesses


@pytest.mark.parametrize("recall", [0.0, 0.8, 1.0])
def test_an_oracle_is_right_as_often_as_it_is_asked_to_be(recall: float) -> None:
    guesses = guessed(recall=recall, depth=1)

    right = [expert in CHOICES[token][ahead] for (token, _, ahead), named in guesses.items() for expert in named]

    assert sum(right) / len(right) == pytest.approx(recall, abs=0.08)


def test_an_oracle_says_the_same_of_a_layer_from_wherever_it_is_asked() -> None:
    guesses = guessed(recall=0.5, depth=2)

    assert all(guesses[token, 0, 2] == guesses[token, 1, 2] for token in range(len(CHOICES)))
    assert {ahead - layer for _, layer, ahead in guesses} == {1, 2}


def test_an_oracle_names_as_many_experts_as_are_chosen_each_once() -> None:
    guesses = guessed(recall=0.5, depth=1)

    assert all(len(set(named)) == 2 for named in guesses.values())


def test_what_was_decoded_is_said_a_token() -> None:
    counters = Tally(misses=10, prefetches_used=4).snapshot()
    decoded = Decoded(n_tokens=3, seconds=1.5, counters=counters, digest="", read_nbytes=600)

    assert (decoded.token_s, decoded.token_nbytes, decoded.recall) == (0.5, 200.0, 0.4)
    assert replace(decoded, counters=None).recall == 0.0
