"""Names the experts that the next layers are likely to choose: their own norms and gates, on this layer's states.

The states are those behind the attention, the earliest point at which they exist (docs/performance.md has what was
measured of later ones). Guesses are computed by a thread of their own workspace: the model's is busy with the experts
meanwhile. Letters: T tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from quant.layer import choose_experts, rms_norm
from quant.linear import Linear
from quant.segment import SegmentWeights
from quant.workspace import Workspace
from runner.experts.source import Guess

# So many tokens choose nearly all experts together: those of the next layer are fetched without a guess.
_GUESSED_TOKENS_MAX = 15


class Lookahead:
    """The gates of all layers, asked ahead of time. Used from the thread that computes the model."""

    def __init__(self, layers: Sequence[SegmentWeights], eps: float, *, n_guessed: int, depth: int) -> None:
        """Guess n_guessed experts a token, for each of the next `depth` layers."""
        self._workspace = Workspace(1)
        self._norms = [weights.post_attention_norm for weights in layers]
        self._gates = [
            Linear(weights.gate.part, weights.gate.part_bytes, workspace=self._workspace, exact=weights.gate.exact)
            for weights in layers
        ]
        self._eps = eps
        self._n_guessed = n_guessed
        self._depth = depth
        self._all = torch.arange(self._gates[0].part.rows)

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterator[tuple[int, Guess]]:
        """Yield the layers ahead with what is likely to be chosen there, the next one first; states f32 [T, H]."""
        for ahead in range(layer + 1, min(layer + 1 + self._depth, len(self._gates))):
            yield ahead, partial(self._likely, ahead, hidden_states)

    def _likely(self, layer: int, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[0] > _GUESSED_TOKENS_MAX:
            return self._all
        normed = rms_norm(hidden_states, self._norms[layer], self._eps, workspace=self._workspace)
        return choose_experts(self._gates[layer](normed), self._n_guessed)[0]  # [T, n_guessed]
