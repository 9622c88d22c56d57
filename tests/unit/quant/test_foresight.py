"""What a later layer's gate is likely to choose: one call and its steps agree, and the states stay as they are."""

import pytest
import torch
from torch import Tensor

from protocol.layout import Part
from quant.encode import encode_part
from quant.errors import BadShape
from quant.foresight import Foresight
from quant.layer import rms_norm
from quant.linear import Linear
from quant.workspace import Workspace

HIDDEN, N_EXPERTS, EPS = 128, 8, 1e-5


@pytest.fixture
def gate() -> Linear:
    part = Part("gate", N_EXPERTS, HIDDEN, "bf16")
    weight = torch.randn(N_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1))
    return Linear(part, encode_part(weight, part, solver="shortcut"))


def states(n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def foresight(gate: Linear, n_guessed: int = 2, norm: Tensor | None = None, margin: float = 0.0) -> Foresight:
    weight = torch.linspace(0.5, 1.5, HIDDEN) if norm is None else norm
    sizes = {"n_guessed": n_guessed, "n_tokens_max": 15}
    return Foresight(weight, gate, eps=EPS, workspace=Workspace(1), margin=margin, **sizes)


@pytest.mark.parametrize("n_tokens", [1, 2, 15])
@pytest.mark.parametrize("n_guessed", [1, 2, 8])
def test_one_call_names_what_its_steps_name_and_leaves_the_states(gate: Linear, n_tokens: int, n_guessed: int) -> None:
    guess = foresight(gate, n_guessed)
    hidden_states = states(n_tokens)

    foreseen = guess(hidden_states)

    assert foreseen.shape == (n_tokens, n_guessed)
    assert torch.equal(foreseen, guess.by_parts(hidden_states))
    assert torch.equal(hidden_states, states(n_tokens))


def test_the_likeliest_comes_first_by_the_layers_own_norm_and_gate(gate: Linear) -> None:
    norm = torch.linspace(0.1, 3.0, HIDDEN)
    hidden_states = states(1, seed=3)

    foreseen = foresight(gate, N_EXPERTS, norm)(hidden_states)

    normed = hidden_states / (hidden_states.square().mean() + EPS).sqrt() * norm
    weight = torch.randn(N_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert foreseen.tolist() == (normed @ weight.t()).argsort(descending=True).tolist()


@pytest.mark.parametrize("n_tokens", [1, 15])
def test_in_the_place_of_what_is_hardly_likelier_than_the_best_left_out_stands_the_likeliest(
    gate: Linear, n_tokens: int
) -> None:
    hidden_states = states(n_tokens)
    ranked = foresight(gate, N_EXPERTS)(hidden_states).tolist()
    normed = rms_norm(hidden_states, torch.linspace(0.5, 1.5, HIDDEN), EPS, workspace=Workspace(1))
    logits = gate(normed).tolist()
    margin = 0.5

    foreseen = foresight(gate, 3, margin=margin)

    expected = [
        [order[0], *(e if row[e] >= row[order[3]] + margin else order[0] for e in order[1:3])]
        for order, row in zip(ranked, logits, strict=True)
    ]
    assert foreseen(hidden_states).tolist() == foreseen.by_parts(hidden_states).tolist() == expected


def test_with_a_margin_all_experts_are_guessed_where_none_is_left_out(gate: Linear) -> None:
    foreseen = foresight(gate, N_EXPERTS, margin=0.5)(states(1))

    assert sorted(foreseen[0].tolist()) == list(range(N_EXPERTS))


@pytest.mark.parametrize("n_guessed", [0, 9])
def test_as_many_experts_as_there_are_can_be_guessed(gate: Linear, n_guessed: int) -> None:
    with pytest.raises(BadShape, match=f"1 to 8 experts can be guessed, not {n_guessed}"):
        foresight(gate, n_guessed)


def test_more_tokens_than_there_is_room_for_are_refused(gate: Linear) -> None:
    with pytest.raises(BadShape, match="up to 15 tokens are expected, 16 came"):
        foresight(gate)(states(16))


def test_states_of_another_width_are_refused(gate: Linear) -> None:
    with pytest.raises(BadShape, match="hidden_states"):
        foresight(gate)(torch.zeros(1, HIDDEN + 8))
