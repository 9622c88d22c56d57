"""The dense weights, computed with where they lie in the shared mapping; nothing is expanded whole but vectors.

Owns the names of the dense tensors and the check that each has the shape that config.json implies. Knows no arithmetic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import part_nbytes
from protocol.schemes import scheme_named
from quant.linear import Linear
from quant.segment import AttentionSegment, SegmentWeights
from quant.workspace import Workspace
from runner.errors import StoreInvalid
from runner.models.mixtral_config import MixtralConfig
from runner.store_view import StoreView


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """All that is not an expert. `lm_head` is `embed_tokens` where they are tied."""

    embed_tokens: Linear
    attention_segments: tuple[AttentionSegment, ...]
    norm: Tensor
    lm_head: Linear


def load_dense_weights(
    store: StoreView, workspace: Workspace, config: MixtralConfig, *, exact: bool = False
) -> DenseWeights:
    """Return the store's dense weights over its own memory; raise StoreInvalid if one is missing or misshapen.

    `exact` multiplies with activations in float where quantized weights would take them rounded to int8.
    """
    source = _Source(store, workspace, exact)
    embed_tokens = source.linear("embed_tokens", config.vocab_size, config.hidden_size)
    if scheme_named(embed_tokens.part.scheme).is_quantized:
        raise StoreInvalid(f"embed_tokens: a 16-bit scheme is expected, the store holds {embed_tokens.part.scheme}")
    return DenseWeights(
        embed_tokens=embed_tokens,
        attention_segments=tuple(_load_segment(source, config, layer) for layer in range(config.n_layers)),
        norm=source.vector("norm", config.hidden_size),
        lm_head=embed_tokens if config.is_tied else source.linear("lm_head", config.vocab_size, config.hidden_size),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """Where tensors come from and what they are computed with."""

    store: StoreView
    workspace: Workspace
    exact: bool

    def vector(self, name: str, cols: int) -> Tensor:
        """Return a tensor of one row, fp32 [cols]; raise StoreInvalid."""
        return self.linear(name, 1, cols).vector()

    def linear(self, name: str, rows: int, cols: int) -> Linear:
        """Return a matrix; raise StoreInvalid unless the store has it in that shape."""
        record = self.store.manifest.dense.get(name)
        if record is None:
            raise StoreInvalid(f"the store has no dense tensor {name!r}")
        part = record.parts[0]
        if len(record.parts) != 1 or (part.rows, part.cols) != (rows, cols):
            shapes = ", ".join(f"[{part.rows}, {part.cols}]" for part in record.parts)
            raise StoreInvalid(f"{name}: config.json implies the shape [{rows}, {cols}], the store holds {shapes}")
        data = torch.frombuffer(self.store.dense_record(name), dtype=torch.uint8)
        return Linear(part, data[: part_nbytes(part)], workspace=self.workspace, exact=self.exact)


def _load_segment(source: _Source, config: MixtralConfig, layer: int) -> AttentionSegment:
    prefix = f"layers.{layer}."
    hidden = config.hidden_size
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    weights = SegmentWeights(
        input_norm=source.vector(prefix + "input_norm", hidden),
        q_proj=source.linear(prefix + "q_proj", q_size, hidden),
        k_proj=source.linear(prefix + "k_proj", kv_size, hidden),
        v_proj=source.linear(prefix + "v_proj", kv_size, hidden),
        o_proj=source.linear(prefix + "o_proj", hidden, q_size),
        post_attention_norm=source.vector(prefix + "post_attention_norm", hidden),
        gate=source.linear(prefix + "gate", config.n_experts, hidden),
    )
    return AttentionSegment(
        weights, layer=layer, top_k=config.top_k, eps=config.rms_norm_eps, workspace=source.workspace
    )
