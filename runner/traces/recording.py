"""Watches a model compute and hands on what every token chose. Owns no file; changes nothing that is computed.

The model calls after_layer() behind each layer, in its own thread, which waits for it. Reading the step's tensors is
what it costs, and the gates of the layers ahead where recall is asked for.
"""

from collections.abc import Callable

from torch import Tensor

from quant.segment import Step
from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER
from runner.traces.recall_tally import RecallTally
from runner.traces.record import DECODE, PREFILL, TokenRouting, TraceShape


class RoutingRecorder:
    """The routing of every token of one sequence, handed to `on_token` when the token's last layer is computed.

    The first `n_prefill_tokens` tokens are recorded as prefill, the others as decode steps: what a token chooses does
    not depend on how many are computed with it, so a text that is computed at once is recorded as if token by token.
    """

    def __init__(
        self,
        shape: TraceShape,
        on_token: Callable[[TokenRouting], None],
        *,
        n_prefill_tokens: int = 0,
        recall: RecallTally | None = None,
    ) -> None:
        self._shape = shape
        self._on_token = on_token
        self._n_prefill_tokens = n_prefill_tokens
        self._recall = recall
        self._layers: list[tuple[list[list[int]], list[list[float]]]] = []

    def after_layer(self, layer: int, step: Step) -> None:
        """Note what the step's tokens chose in this layer; `step.added` is what its experts gave."""
        if layer == 0:
            self._layers = []  # of a step that was not finished
        self._layers.append((step.expert_ids.tolist(), step.expert_weights.tolist()))
        if self._recall is not None:
            self._recall.see(layer, step.expert_ids, _states(step))
        if layer == self._shape.n_layers - 1:
            self._hand_on(len(step.expert_ids))

    def _hand_on(self, n_tokens: int) -> None:
        for token in range(n_tokens):
            is_prefill = self._n_prefill_tokens > 0
            self._n_prefill_tokens -= is_prefill
            self._on_token(
                TokenRouting(
                    PREFILL if is_prefill else DECODE,
                    tuple(tuple(expert_ids[token]) for expert_ids, _ in self._layers),
                    tuple(tuple(weights[token]) for _, weights in self._layers),
                )
            )
        self._layers = []


def _states(step: Step) -> dict[str, Tensor]:
    """Return the residual stream, f32 [T, H], at the two points where a guess can be made."""
    after_attention = step.hidden_states
    after_layer = after_attention if step.added is None else after_attention + step.added
    return {AFTER_ATTENTION: after_attention, AFTER_LAYER: after_layer}
