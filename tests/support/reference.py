"""The oracle: transformers' Mixtral in float32 with eager attention, of a checkpoint or of a store's own bits.

Importing transformers takes seconds, so it happens in the functions: call them from module-scoped fixtures.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from protocol.handles import ExpertKey
from protocol.layout import record_spans
from protocol.manifest import Record
from protocol.schemes import scheme_named
from quant.reference import dequantize
from runner.store_view import StoreView


class ReferenceOutput(Protocol):
    """As much of its output as the tests use."""

    logits: Tensor  # [batch, T, vocab]


class ReferenceModel(Protocol):
    """As much of MixtralForCausalLM as the tests use."""

    def __call__(self, input_ids: Tensor, *, use_cache: bool) -> ReferenceOutput: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> object: ...

    def state_dict(self) -> dict[str, Tensor]: ...


def load_reference(checkpoint: Path) -> ReferenceModel:
    with warnings.catch_warnings():
        # transformers and what it imports warn of their own deprecations.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        from transformers import MixtralForCausalLM

        # from_pretrained puts the model into evaluation mode.
        model: ReferenceModel = MixtralForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
    return model


def load_dequantized(checkpoint: Path, store: StoreView) -> ReferenceModel:
    """Return the reference with every weight replaced by what the store's bits mean."""
    model = load_reference(checkpoint)
    state = model.state_dict()
    manifest = store.manifest
    for name, record in manifest.dense.items():
        state[_hub_name(name)].copy_(_parts(record, store.dense_record(name))[name].view_as(state[_hub_name(name)]))
    for layer in range(manifest.model.n_layers):
        _put_experts(state, store, layer)
    model.load_state_dict(state)
    return model


def reference_logits(model: ReferenceModel, token_ids: Sequence[int]) -> Tensor:
    """Return the reference's logits [T, vocab] behind every token."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a fraction of the expected logits' range."""
    return float((logits - expected).abs().max() / (expected.max() - expected.min()))


def _put_experts(state: dict[str, Tensor], store: StoreView, layer: int) -> None:
    model = store.manifest.model
    prefix = f"model.layers.{layer}.mlp.experts."
    for expert in range(model.n_experts):
        key = ExpertKey(layer, expert)
        parts = _parts(store.manifest.experts[key], store.expert_record(key))
        state[prefix + "gate_up_proj"][expert].copy_(torch.cat((parts["w1"], parts["w3"])))
        state[prefix + "down_proj"][expert].copy_(parts["w2"])


def _parts(record: Record, data: memoryview) -> dict[str, Tensor]:
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return {
        span.part.name: dequantize(
            flat[span.offset : span.offset + span.nbytes],
            span.part.rows,
            span.part.cols,
            scheme_named(span.part.scheme),
        )
        for span in record_spans(record.layout_id, record.parts)
    }


def _hub_name(name: str) -> str:
    """Return transformers' name of a dense tensor of the store."""
    if name == "lm_head":
        return "lm_head.weight"
    renamed = (
        name.replace("post_attention_norm", "post_attention_layernorm")
        .replace("input_norm", "input_layernorm")
        .replace("gate", "mlp.gate")
    )
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        renamed = renamed.replace(projection, f"self_attn.{projection}")
    return f"model.{renamed}.weight"
