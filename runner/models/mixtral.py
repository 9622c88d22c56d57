"""Mixtral, in the order of the computation. Knows neither stores nor where experts are computed.

T   tokens of this step, all sequences one after another     D   head_dim
H   hidden size          V   vocabulary

    hidden_states [T, H] = embed_tokens(token_ids)
    a layer:  hidden_states += o_proj(attention(input_norm(hidden_states)))
              hidden_states += experts(post_attention_norm(hidden_states))
    logits [n_wanted, V] = lm_head(norm(hidden_states[wanted]))

Each of these additions is done together with the norm that comes after it: what a segment adds is handed on to the next
one as `added`. All arithmetic between the products is fp32; keys and values go through the kv_cache, so that they are
rounded alike in prefill and decode. One token and many take the same path.
The architecture: Jiang et al., Mixtral of Experts, 2024; its conventions (rotary halves, window) are transformers'.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.layer import Attention, rms_norm
from quant.layers import Layers
from quant.segment import Step
from quant.workspace import Workspace
from runner.experts.source import ExpertSource, Guess
from runner.kv_cache import KVCache
from runner.models.mixtral_config import MixtralConfig
from runner.models.rotary import RotaryAngles
from runner.weights import DenseWeights

# A step of more tokens is computed layer by layer: what the interpreter takes is little beside it, and it can be
# interrupted only between two calls.
_AT_ONCE_TOKENS_MAX = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one sequence that a step computes, to be put behind those in its kv_cache."""

    kv_cache: KVCache
    token_ids: Sequence[int]


class LayerObserver(Protocol):
    """Somebody who looks on; changes nothing."""

    def after_layer(self, layer: int, step: Step) -> None:
        """Note what that layer made of the step; `step.added` is what its experts gave."""
        ...


class Ahead(Protocol):
    """Whoever names the experts of later layers, for `ExpertSource.prefetch`."""

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterable[tuple[int, Guess]]:
        """Return later layers, the next one first, with what is likely to be chosen there; states f32 [T, H]."""
        ...


class Routing(Ahead, Protocol):
    """Somebody who chooses, and guesses, in the gates' place: for measurements on weights that mean nothing."""

    def route(self, layer: int, step: Step) -> None:
        """Overwrite the step's expert_ids and expert_weights of that layer."""
        ...


class Mixtral:
    """One model over its weights. Holds no state between steps: that is the sequences'.

    Computes with the workspace's threads, in the one thread that calls it. `ahead` is asked between a layer's attention
    and its experts; without it nothing is prefetched. `layers` computes all layers in one call where nobody is to be
    asked between them, those experts aside that are used for the first time.
    """

    def __init__(
        self,
        config: MixtralConfig,
        weights: DenseWeights,
        experts: ExpertSource,
        workspace: Workspace,
        ahead: Ahead | None = None,
        *,
        layers: Layers | None = None,
    ) -> None:
        self.config = config
        self._weights = weights
        self._experts = experts
        self._workspace = workspace
        self._layers = layers
        self._angles = RotaryAngles(config.head_dim, config.rope_theta)
        self.ahead = ahead
        self.routing: Routing | None = None
        self.observer: LayerObserver | None = None

    def gate_logits(self, layer: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer's norm and gate give states that are not its own yet, fp32 [T, H] → [T, n_experts]."""
        weights = self._weights.attention_segments[layer].weights
        norm, eps = weights.post_attention_norm, self.config.rms_norm_eps
        return weights.gate(rms_norm(hidden_states, norm, eps, workspace=self._workspace))

    def forward(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Compute the pieces' tokens and return the logits of the rows that are wanted, fp32 [n_wanted, V].

        Rows count the tokens of all pieces, one piece after another. Raise CorruptExpert or ContextFull; the
        kv_caches are then as they were.
        """
        for piece in pieces:
            piece.kv_cache.check_room(len(piece.token_ids))
        token_ids = torch.tensor([token_id for piece in pieces for token_id in piece.token_ids])
        attentions = self._place(pieces, len(token_ids))
        hidden_states = self._weights.embed_tokens.rows(token_ids)  # [T, H], this step's own
        step = Step(hidden_states, attentions, like=self._weights.attention_segments[0])
        is_alone = self.routing is None and self.ahead is None and self.observer is None
        if self._layers is not None and is_alone and len(token_ids) <= _AT_ONCE_TOKENS_MAX:
            self._all_at_once(step, self._layers)
        else:
            self._layer_by_layer(step)
        logits = self._head(hidden_states, step.added, list(wanted))
        for piece in pieces:
            piece.kv_cache.advance(len(piece.token_ids))
        return logits

    def _all_at_once(self, step: Step, layers: Layers) -> None:
        layer = layers(step)
        while layer < self.config.n_layers:
            step.added = self._experts.forward(layer, step.normed, step.expert_ids, step.expert_weights)
            layer = layers(step, layer + 1)

    def _layer_by_layer(self, step: Step) -> None:
        for layer, attention_segment in enumerate(self._weights.attention_segments):
            attention_segment(step)
            if self.routing is not None:
                self.routing.route(layer, step)
            if self.ahead is not None:
                for later, guess in self.ahead.guesses(layer, step.hidden_states):
                    self._experts.prefetch(later, guess)
            step.added = self._experts.forward(layer, step.normed, step.expert_ids, step.expert_weights)
            if self.observer is not None:
                self.observer.after_layer(layer, step)

    def _place(self, pieces: Sequence[Piece], n_rows: int) -> list[Attention]:
        """Return each piece's attention: over its kv_cache, of its rows of the step."""
        attentions, row = [], 0
        for piece in pieces:
            kv_cache, n_tokens = piece.kv_cache, len(piece.token_ids)
            attentions.append(
                Attention(
                    (kv_cache.keys, kv_cache.values),
                    self._angles.of(kv_cache.length, kv_cache.length + n_tokens),
                    n_heads=self.config.n_heads,
                    window=self.config.sliding_window,
                    start=kv_cache.length,
                    rows=slice(row, row + n_tokens),
                    n_rows=n_rows,
                    workspace=self._workspace,
                )
            )
            row += n_tokens
        return attentions

    def _head(self, hidden_states: Tensor, added: Tensor | None, wanted: list[int]) -> Tensor:
        if wanted != list(range(hidden_states.shape[0])):
            hidden_states, added = hidden_states[wanted], None if added is None else added[wanted]
        if not wanted:
            return hidden_states.new_empty(0, self.config.vocab_size)
        normed = rms_norm(
            hidden_states, self._weights.norm, self.config.rms_norm_eps, workspace=self._workspace, added=added
        )
        return self._weights.lm_head(normed)
