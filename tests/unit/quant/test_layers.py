"""All layers in one call against layer by layer: the same bits, and what happens where an expert is not there yet."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from protocol.schemes import Q2_G16
from quant.errors import BadShape, QuantError
from quant.expert import Expert, LayerExperts
from quant.layers import Layers
from quant.segment import AttentionSegment, Step
from quant.workspace import Workspace
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.expert_records import expert_of
from tests.unit.quant.matrices import gaussian
from tests.unit.quant.test_segment import EXPERTS, HIDDEN, LAYERS, make_attentions, make_segment


@dataclass(frozen=True, slots=True)
class Model:
    """Layers of random weights; each layer has tables of its own, of the same experts."""

    segments: list[AttentionSegment]
    experts: list[LayerExperts]
    all_experts: list[Expert]
    workspace: Workspace

    def at_once(self) -> Layers:
        return Layers(self.segments, self.experts, workspace=self.workspace)

    def step(self, lengths: tuple[int, ...]) -> Step:
        hidden_states = gaussian(sum(lengths), HIDDEN, std=1.0, seed=7)
        return Step(hidden_states, make_attentions(lengths, self.workspace), like=self.segments[0])

    def put(self, layer: int, experts: set[int]) -> None:
        for expert in experts:
            self.experts[layer].put(expert, self.all_experts[expert])


def make_model(workspace: Workspace, *, put: bool = True) -> Model:
    model = Model(
        segments=[make_segment(workspace, layer=layer) for layer in range(LAYERS)],
        experts=[LayerExperts(EXPERTS, HIDDEN, workspace=workspace) for _ in range(LAYERS)],
        all_experts=[expert_of(Q2_G16, seed, hidden=HIDDEN, intermediate=192) for seed in range(EXPERTS)],
        workspace=workspace,
    )
    for layer in range(LAYERS if put else 0):
        model.put(layer, set(range(EXPERTS)))
    return model


def layer_by_layer(model: Model, step: Step) -> None:
    for segment, experts in zip(model.segments, model.experts, strict=True):
        segment(step)
        step.added = experts.forward(step.normed, step.expert_ids, step.expert_weights)


def results_of(step: Step) -> list[Tensor]:
    assert step.added is not None
    return [step.hidden_states, step.added, step.normed, step.expert_ids, step.expert_weights]


def assert_equal_bits(step: Step, other: Step) -> None:
    assert all(torch.equal(one, two) for one, two in zip(results_of(step), results_of(other), strict=True))


@pytest.mark.parametrize("lengths", [(1,), (3, 1)])
@pytest.mark.parametrize("added", [False, True])
def test_layers_at_once_have_the_bits_of_one_after_another(lengths: tuple[int, ...], *, added: bool) -> None:
    with Workspace(2) as workspace:
        model = make_model(workspace)
        step, other = model.step(lengths), model.step(lengths)
        if added:
            step.added, other.added = (gaussian(sum(lengths), HIDDEN, std=1.0, seed=8) for _ in range(2))

        n_computed = model.at_once()(step)

        layer_by_layer(model, other)
        assert n_computed == LAYERS
        assert_equal_bits(step, other)


@pytest.mark.parametrize("missing_in", range(LAYERS))
def test_a_layer_whose_expert_is_missing_is_left_to_the_caller(missing_in: int) -> None:
    with Workspace() as workspace:
        model = make_model(workspace, put=False)
        for layer in set(range(LAYERS)) - {missing_in}:
            model.put(layer, set(range(EXPERTS)))
        step, other, at_once = model.step((1,)), model.step((1,)), model.at_once()

        stopped_at = at_once(step)
        added_there = step.added
        model.put(missing_in, set(step.expert_ids.flatten().tolist()))
        step.added = model.experts[missing_in].forward(step.normed, step.expert_ids, step.expert_weights)
        n_computed = at_once(step, missing_in + 1)

        layer_by_layer(model, other)
        assert (stopped_at, added_there, n_computed) == (missing_in, None, LAYERS)
        assert_equal_bits(step, other)


@needs_library
def test_an_error_names_the_layer() -> None:
    with Workspace() as workspace:
        model = make_model(workspace)
        step, at_once = model.step((1,)), model.at_once()
    # The workspace is closed now.

    with pytest.raises(QuantError, match="layer 0: the workspace is closed"):
        at_once(step)


def test_layers_that_do_not_fit_together_are_refused() -> None:
    with Workspace() as workspace:
        model = make_model(workspace)
        exact = [LayerExperts(EXPERTS, HIDDEN, workspace=workspace, exact=True) for _ in range(LAYERS)]

        with pytest.raises(BadShape, match="experts of 2 layers are expected, of 1 came"):
            Layers(model.segments, model.experts[:1], workspace=workspace)
        with pytest.raises(BadShape, match="exactly or not"):
            Layers(model.segments, exact, workspace=workspace)
