"""Names the experts that the next layers are likely to choose: their own norms and gates, on this layer's states.

The states are those behind the attention, the earliest point at which they exist (docs/performance.md has what was
measured of later ones). Guesses are computed by a thread of their own workspace: the model's is busy with the experts
meanwhile. Letters: T tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from quant.foresight import Foresight
from quant.segment import SegmentWeights
from quant.workspace import Workspace
from runner.experts.source import PREFILL_TOKENS_MIN, Guess


class Lookahead:
    """The gates of all layers, asked ahead of time. Used from the thread that computes the model."""

    def __init__(
        self, layers: Sequence[SegmentWeights], eps: float, *, n_guessed: int, depth: int, margin: float = 0.0
    ) -> None:
        """Guess up to n_guessed experts a token, for each of the next `depth` layers; `margin` is `Foresight`'s."""
        workspace = Workspace(1)
        self._layers = [
            Foresight(
                weights.post_attention_norm,
                weights.gate,
                eps=eps,
                n_guessed=n_guessed,
                n_tokens_max=PREFILL_TOKENS_MIN - 1,
                workspace=workspace,
                margin=margin,
            )
            for weights in layers
        ]
        self._depth = depth
        self._all = torch.arange(layers[0].gate.part.rows)

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterator[tuple[int, Guess]]:
        """Yield the layers ahead with what is likely to be chosen there, the next one first; states f32 [T, H]."""
        for ahead in range(layer + 1, min(layer + 1 + self._depth, len(self._layers))):
            yield ahead, partial(self._likely, ahead, hidden_states)

    def _likely(self, layer: int, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[0] >= PREFILL_TOKENS_MIN:
            return self._all
        return self._layers[layer](hidden_states)  # [T, n_guessed]
