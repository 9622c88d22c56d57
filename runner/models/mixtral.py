"""Mixtral, in the order of the computation. Knows neither stores nor where experts are computed.

T   tokens of this step, all sequences one after another     S   tokens of one sequence that are visible to a query
H   hidden size          V   vocabulary                      G   query heads a kv head, D   head_dim

    hidden_states [T, H] = embed_tokens(token_ids)
    a layer:  hidden_states += o_proj(attention(input_norm(hidden_states)))
              hidden_states += experts(post_attention_norm(hidden_states))
    logits [n_wanted, V] = lm_head(norm(hidden_states[wanted]))

All arithmetic is fp32; keys and values go through the kv_cache, so that they are rounded alike in prefill and decode.
The architecture: Jiang et al., Mixtral of Experts, 2024; its conventions (rotary halves, window) are transformers'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runner.experts.source import ExpertSource
from runner.kv_cache import KVCache
from runner.models.mixtral_config import MixtralConfig
from runner.weights import DenseWeights, LayerWeights


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one sequence that a step computes, to be put behind those in its kv_cache."""

    kv_cache: KVCache
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Span:
    """A piece's place: its rows of the step, and the positions first..end-1 its queries may see, as `mask` says."""

    kv_cache: KVCache
    rows: slice
    first: int
    end: int
    mask: Tensor | None  # [T of the piece, end - first], None where all is visible


class Mixtral:
    """One model over its weights. Holds no state between steps: that is the sequences'."""

    def __init__(self, config: MixtralConfig, weights: DenseWeights, experts: ExpertSource) -> None:
        self.config = config
        self._weights = weights
        self._experts = experts
        # [D / 2]: theta^(-2i / D)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._frequencies = 1.0 / config.rope_theta**exponents

    def forward(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Compute the pieces' tokens and return the logits of the rows that are wanted, fp32 [n_wanted, V].

        Rows count the tokens of all pieces, one piece after another. Raise CorruptExpert or ContextFull; the
        kv_caches are then as they were.
        """
        for piece in pieces:
            piece.kv_cache.check_room(len(piece.token_ids))
        token_ids = torch.tensor([token_id for piece in pieces for token_id in piece.token_ids])
        spans = self._place(pieces)
        rotation = self._rotation(spans)
        hidden_states = self._weights.embed_tokens.rows(token_ids)  # [T, H]
        for layer in range(self.config.n_layers):
            hidden_states = self._attention_segment(layer, hidden_states, spans, rotation)
            hidden_states = self._expert_segment(layer, hidden_states)
        logits = self._head(hidden_states[list(wanted)])
        for piece in pieces:
            piece.kv_cache.advance(len(piece.token_ids))
        return logits

    def _place(self, pieces: Sequence[Piece]) -> list[_Span]:
        spans, row = [], 0
        for piece in pieces:
            start, n_tokens = piece.kv_cache.length, len(piece.token_ids)
            end = start + n_tokens
            window = self.config.sliding_window or end
            first = max(0, start - window + 1)
            mask = None if n_tokens == 1 else _visible(start, first, end, window)
            spans.append(_Span(piece.kv_cache, slice(row, row + n_tokens), first, end, mask))
            row += n_tokens
        return spans

    def _rotation(self, spans: Sequence[_Span]) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each token's rotary angles, both [T, 1, D / 2]."""
        starts = [torch.arange(span.kv_cache.length, span.end, dtype=torch.float32) for span in spans]
        angles = (torch.cat(starts).unsqueeze(1) * self._frequencies).unsqueeze(1)
        return angles.cos(), angles.sin()

    def _attention_segment(
        self, layer: int, hidden_states: Tensor, spans: Sequence[_Span], rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        config, weights = self.config, self._weights.layers[layer]
        n_tokens = hidden_states.shape[0]
        normed = _rms_norm(hidden_states, weights.input_norm, config.rms_norm_eps)
        queries = _rotate(weights.q_proj(normed).view(n_tokens, config.n_heads, config.head_dim), *rotation)
        keys = _rotate(weights.k_proj(normed).view(n_tokens, config.n_kv_heads, config.head_dim), *rotation)
        values = weights.v_proj(normed).view(n_tokens, config.n_kv_heads, config.head_dim)
        attended = torch.cat([self._attend(layer, span, queries, keys, values) for span in spans])  # [T, heads * D]
        return hidden_states + weights.o_proj(attended)

    def _attend(self, layer: int, span: _Span, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention of one sequence's queries over its kv_cache, [T of the span, heads * D]."""
        n_kv_heads, head_dim = self.config.n_kv_heads, self.config.head_dim
        n_queries = span.rows.stop - span.rows.start
        span.kv_cache.write(layer, keys[span.rows].transpose(0, 1), values[span.rows].transpose(0, 1))
        past_keys, past_values = span.kv_cache.read(layer, span.first, span.end)  # both [kv heads, S, D]
        grouped = queries[span.rows].view(n_queries, n_kv_heads, -1, head_dim)  # [T, kv heads, G, D]
        if n_queries == 1:
            return _attend_once(grouped[0], past_keys, past_values).reshape(1, -1)
        attended = _attend_many(grouped.permute(1, 2, 0, 3), past_keys, past_values, span.mask)
        return attended.permute(2, 0, 1, 3).reshape(n_queries, -1)

    def _expert_segment(self, layer: int, hidden_states: Tensor) -> Tensor:
        weights: LayerWeights = self._weights.layers[layer]
        normed = _rms_norm(hidden_states, weights.post_attention_norm, self.config.rms_norm_eps)
        # The softmax over the chosen alone is the softmax over all, normalized over the chosen.
        gate_logits, expert_ids = weights.gate(normed).topk(self.config.top_k)  # both [T, top_k]
        return hidden_states + self._experts.forward(layer, normed, expert_ids, gate_logits.softmax(-1))

    def _head(self, hidden_states: Tensor) -> Tensor:
        if not hidden_states.shape[0]:
            return hidden_states.new_empty(0, self.config.vocab_size)
        return self._weights.lm_head(_rms_norm(hidden_states, self._weights.norm, self.config.rms_norm_eps))


def _visible(start: int, first: int, end: int, window: int) -> Tensor:
    """Return which of the keys first..end-1 the queries start..end-1 see: those with 0 <= q - k < window."""
    distance = torch.arange(start, end).unsqueeze(1) - torch.arange(first, end)
    return (distance >= 0) & (distance < window)


def _attend_once(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention of one token, [kv heads, G, D], over keys and values [kv heads, S, D].

    torch's own attention would do, but for one token its result depends on the number of threads.
    """
    scores = torch.bmm(queries * queries.shape[-1] ** -0.5, keys.transpose(1, 2))  # [kv heads, G, S]
    return torch.bmm(scores.softmax(-1), values)


def _attend_many(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of queries [kv heads, G, T, D] over keys and values [kv heads, S, D]; mask [T, S]."""
    shared = (-1, queries.shape[1], -1, -1)  # the G query heads of a kv head read the same memory
    return scaled_dot_product_attention(
        queries, keys.unsqueeze(1).expand(shared), values.unsqueeze(1).expand(shared), attn_mask=mask
    )


def _rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return hidden_states [T, H] over their root mean square, times the weight [H] (Zhang and Sennrich, 2019)."""
    mean_square = hidden_states.square().mean(-1, keepdim=True)
    return hidden_states * (mean_square + eps).rsqrt_() * weight


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return heads [T, n, D] turned by their positions' angles; the pairs are (i, i + D/2) (Su et al., 2021)."""
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
