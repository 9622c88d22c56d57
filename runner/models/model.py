"""What the engine asks of a model, wherever it is computed."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from runner.models.mixtral import Ahead, LayerObserver, Piece, Routing


class Model(Protocol):
    """A model over its weights, called from one thread. Its state between steps is the sequences'."""

    ahead: Ahead | None
    routing: Routing | None
    observer: LayerObserver | None

    def gate_logits(self, layer: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer's norm and gate give states that are not its own yet, fp32 [T, H] → [T, n_experts]."""
        ...

    def forward(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Compute the pieces' tokens and return the logits of the rows that are wanted, fp32 [n_wanted, V]."""
        ...
