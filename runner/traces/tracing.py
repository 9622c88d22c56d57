"""Computes tokens with an engine and keeps what they chose: of a text, or of a prompt and its greedy answer.

Computes in the calling thread, as the engine does. Whatever raises leaves the tokens that were complete handed on.
"""

from collections.abc import Callable, Iterator, Sequence

from runner.engine import Engine
from runner.errors import PromptInvalid
from runner.traces.recall import Recall
from runner.traces.recall_tally import RecallTally
from runner.traces.record import TokenRouting, Trace, TraceShape
from runner.traces.recording import RoutingRecorder


class Tracing:
    """One trace in the making. `on_token` gets every token as soon as it is complete."""

    def __init__(self, engine: Engine, on_token: Callable[[TokenRouting], None]) -> None:
        self._engine = engine
        self.shape = shape_of(engine)
        self._recall = RecallTally(self.shape, engine.gates)
        self._tokens: list[TokenRouting] = []
        self._on_token = on_token

    def compute_text(self, token_ids: Sequence[int], window: int) -> Iterator[int]:
        """Compute a text as if it came token by token; yield the length of each window, which is a sequence of its own.

        Raise PromptInvalid for a text without tokens.
        """
        if not token_ids:
            raise PromptInvalid("the text has no tokens; there is nothing to record")
        for start in range(0, len(token_ids), window):
            ids = token_ids[start : start + window]
            sequence = self._engine.new_sequence(len(ids))
            sequence.append(ids)
            with self._engine.observed_by(self._recorder(n_prefill_tokens=0)):
                self._engine.step([sequence])
            yield len(ids)

    def compute_answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Compute a prompt, which is the prefill, and its most probable answer."""
        with self._engine.observed_by(self._recorder(n_prefill_tokens=len(prompt_ids))):
            for _ in self._engine.generate(prompt_ids, max_new_tokens=max_new_tokens):
                pass

    def trace(self) -> Trace:
        """Return what was recorded until now."""
        return Trace(self.shape, tuple(self._tokens))

    def recalls(self) -> tuple[Recall, ...]:
        """Return how well each layer's states named the experts of later ones, prefill included."""
        return self._recall.result()

    def _recorder(self, *, n_prefill_tokens: int) -> RoutingRecorder:
        return RoutingRecorder(self.shape, self._keep, n_prefill_tokens=n_prefill_tokens, recall=self._recall)

    def _keep(self, token: TokenRouting) -> None:
        self._tokens.append(token)
        self._on_token(token)


def shape_of(engine: Engine) -> TraceShape:
    """Return what a trace says of the engine's model."""
    config = engine.config
    return TraceShape(config.n_layers, config.n_experts, config.top_k)
