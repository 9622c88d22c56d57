"""What the model asks of its experts. Knows not where they lie or are computed: in place, on a device, elsewhere."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# So many tokens choose nearly all of a layer's experts together: those of the next layer are copied without a guess.
PREFILL_TOKENS_MIN = 16

# Returns the experts of one layer that are likely to be chosen, int64, the likeliest first; called only if that helps.
Guess = Callable[[], Tensor]


class ExpertSource(Protocol):
    """The experts of all layers. Called from the one thread that computes the model."""

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden]; raise CorruptExpert.

        hidden_states fp32 [T, hidden]; expert_ids int64 [T, top_k], distinct in a row, in the gate's order;
        weights fp32 [T, top_k]. Each contribution is computed by itself and summed in the gate's order, so that the
        result does not depend on the order in which experts are computed.
        """
        ...

    def prefetch(self, layer: int, guess: Guess) -> None:
        """Hint, before `forward` of the layer that is computed now, at what a later layer is likely to choose."""
        ...
