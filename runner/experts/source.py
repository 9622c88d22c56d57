"""What the model asks of its experts. Knows not where they lie or are computed: in place, on a device, elsewhere."""

from typing import Protocol

from torch import Tensor


class ExpertSource(Protocol):
    """The experts of all layers. Called from the one thread that computes the model."""

    def forward(self, layer: int, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, fp32 [T, hidden]; raise CorruptExpert.

        hidden_states fp32 [T, hidden]; expert_ids int64 [T, top_k], distinct in a row, in the gate's order;
        weights fp32 [T, top_k]. Each contribution is computed by itself and summed in the gate's order, so that the
        result does not depend on the order in which experts are computed.
        """
        ...

    def prefetch(self, layer: int, expert_ids: Tensor) -> None:
        """Hint that these experts of the layer are likely to be asked for next."""
        ...
