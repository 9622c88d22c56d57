"""A layer's segment in one call against the same steps one by one, and what it refuses."""

import dataclasses

import pytest
import torch
from torch import Tensor

from protocol.schemes import BF16, Q4_G64, Q8_G64, Scheme
from quant.errors import BadShape
from quant.layer import KEY_BLOCK, Attention
from quant.linear import Linear
from quant.segment import AttentionSegment, SegmentWeights, Step
from quant.workspace import Workspace
from tests.unit.quant.matrices import encoded, gaussian

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K = 128, 4, 2, 64, 5, 2
LAYERS = 2


def make_segment(workspace: Workspace, scheme: Scheme = Q4_G64, *, layer: int = 1) -> AttentionSegment:
    def linear(rows: int, cols: int, seed: int, scheme: Scheme = scheme) -> Linear:
        part, part_bytes = encoded(rows, cols, scheme, seed=seed)
        return Linear(part, part_bytes, workspace=workspace)

    weights = SegmentWeights(
        input_norm=1 + gaussian(1, HIDDEN, std=0.1)[0],
        q_proj=linear(HEADS * HEAD_DIM, HIDDEN, 1),
        k_proj=linear(KV_HEADS * HEAD_DIM, HIDDEN, 2),
        v_proj=linear(KV_HEADS * HEAD_DIM, HIDDEN, 3),
        o_proj=linear(HIDDEN, HEADS * HEAD_DIM, 4),
        post_attention_norm=1 + gaussian(1, HIDDEN, std=0.1, seed=1)[0],
        gate=linear(EXPERTS, HIDDEN, 5, BF16),
    )
    return AttentionSegment(weights, layer=layer, top_k=TOP_K, eps=1e-5, workspace=workspace)


def make_attentions(lengths: tuple[int, ...], workspace: Workspace) -> list[Attention]:
    attentions, row = [], 0
    for n_tokens in lengths:
        keys = torch.zeros(LAYERS, KV_HEADS, 1, HEAD_DIM, KEY_BLOCK, dtype=torch.float16)
        values = torch.zeros(LAYERS, KV_HEADS, KEY_BLOCK, HEAD_DIM, dtype=torch.float16)
        angles = torch.arange(n_tokens).unsqueeze(1) * gaussian(1, HEAD_DIM // 2, std=1.0)
        attentions.append(
            Attention(
                (keys, values),
                (angles.cos(), angles.sin()),
                n_heads=HEADS,
                window=None,
                start=0,
                rows=slice(row, row + n_tokens),
                n_rows=sum(lengths),
                workspace=workspace,
            )
        )
        row += n_tokens
    return attentions


def results_of(segment: AttentionSegment, lengths: tuple[int, ...], *, at_once: bool, added: bool) -> list[Tensor]:
    n_tokens = sum(lengths)
    with Workspace() as workspace:
        step = Step(gaussian(n_tokens, HIDDEN, std=1.0, seed=7), make_attentions(lengths, workspace), like=segment)
        step.added = gaussian(n_tokens, HIDDEN, std=1.0, seed=8) if added else None
        (segment if at_once else segment.by_parts)(step)
    assert step.added is None
    return [step.hidden_states, step.normed, step.expert_ids, step.expert_weights]


@pytest.mark.parametrize("scheme", [Q4_G64, Q8_G64, BF16], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 1, 5)])
@pytest.mark.parametrize("added", [False, True])
def test_a_segment_at_once_has_the_bits_of_its_steps(scheme: Scheme, lengths: tuple[int, ...], added: bool) -> None:  # noqa: FBT001
    with Workspace(2) as workspace:
        segment = make_segment(workspace, scheme)

        at_once = results_of(segment, lengths, at_once=True, added=added)

        by_parts = results_of(segment, lengths, at_once=False, added=added)
    assert all(torch.equal(one, other) for one, other in zip(at_once, by_parts, strict=True))


def test_arrays_that_do_not_fit_are_refused() -> None:
    with Workspace() as workspace:
        segment = make_segment(workspace)
        attentions = make_attentions((3,), workspace)

        with pytest.raises(BadShape, match="hidden_states: contiguous float32"):
            Step(torch.zeros(3, HIDDEN + 64), attentions, like=segment)
        with pytest.raises(BadShape, match=r"queries \[4, 256\]"):
            Step(torch.zeros(4, HIDDEN), attentions, like=segment)
        step = Step(torch.zeros(3, HIDDEN), attentions, like=segment)
        step.added = torch.zeros(2, HIDDEN)
        with pytest.raises(BadShape, match="added: contiguous float32"):
            segment(step)


def test_weights_that_do_not_fit_are_refused() -> None:
    with Workspace() as workspace:
        weights = make_segment(workspace).weights

        with pytest.raises(BadShape, match="input_norm: contiguous float32"):
            AttentionSegment(
                dataclasses.replace(weights, input_norm=torch.ones(HIDDEN + 1)),
                layer=0, top_k=TOP_K, eps=1e-5, workspace=workspace,
            )  # fmt: skip
