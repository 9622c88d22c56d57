"""Steps as a model's layers leave them, and gates whose logits are known."""

import torch
from torch import Tensor

from protocol.layout import Part
from quant.encode import encode_part
from quant.linear import Linear
from quant.segment import AttentionSegment, SegmentWeights, Step
from quant.workspace import Workspace

HIDDEN, N_EXPERTS, TOP_K = 64, 8, 2


def new_step(hidden_states: Tensor, expert_ids: list[list[int]], added: Tensor | None = None) -> Step:
    """Return the step of a layer whose experts are computed; every expert has the same weight."""
    step = Step(hidden_states, [], like=_segment())
    step.expert_ids.copy_(torch.tensor(expert_ids))
    step.expert_weights.fill_(1 / TOP_K)
    step.added = added
    return step


def one_hot(*experts: int) -> Tensor:
    """Return states f32 [T, HIDDEN]: a token each, of which first_numbers() says that expert."""
    states = torch.zeros(len(experts), HIDDEN)
    states[range(len(experts)), list(experts)] = 1
    return states


def first_numbers(hidden_states: Tensor) -> Tensor:
    """Be a gate: the logits are the first numbers of the states."""
    return hidden_states[:, :N_EXPERTS].contiguous()


def _segment() -> AttentionSegment:
    workspace = Workspace()

    def linear(name: str, rows: int) -> Linear:
        part = Part(name, rows, HIDDEN, "bf16")
        return Linear(part, encode_part(torch.zeros(rows, HIDDEN), part, solver="shortcut"), workspace=workspace)

    weights = SegmentWeights(
        input_norm=torch.ones(HIDDEN),
        q_proj=linear("q_proj", HIDDEN),
        k_proj=linear("k_proj", HIDDEN),
        v_proj=linear("v_proj", HIDDEN),
        o_proj=linear("o_proj", HIDDEN),
        post_attention_norm=torch.ones(HIDDEN),
        gate=linear("gate", N_EXPERTS),
    )
    return AttentionSegment(weights, layer=0, top_k=TOP_K, eps=1e-5, workspace=workspace)
