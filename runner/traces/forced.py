"""A recorded routing instead of the gates': weights that mean nothing then use experts as a real model does.

Decode token i of a sequence takes what decode token i of the trace chose; a prefill's tokens take the trace's last
decode tokens, so that a cache is warm as behind a prompt. The model may have fewer layers than the trace. Guesses are
made up: each true expert is among them with the probability that is the recall, and wrong ones fill the rest. Pure but
for the step that it overwrites. Letters: T tokens.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from quant.segment import Step
from runner.errors import ConfigInvalid
from runner.experts.source import Guess
from runner.traces.errors import TraceInvalid
from runner.traces.record import DECODE, TokenRouting, Trace, TraceShape


class ForcedRouting:
    """Chooses for one sequence whose first `n_prefill_tokens` are its prefill, from the trace's token `first` on.

    It stands where the gates do (`route`) and where the next gates' guesses do (`guesses`).
    """

    def __init__(
        self,
        trace: Trace,
        shape: TraceShape,
        *,
        n_prefill_tokens: int,
        recall: float = 1.0,
        n_guessed: int = 2,
        seed: int = 0,
    ) -> None:
        """Raise TraceInvalid if the trace is no routing of such a model, ConfigInvalid for an impossible recall."""
        check_fits(trace, shape)
        if not 0.0 <= recall <= 1.0:
            raise ConfigInvalid(f"recall: a number from 0 to 1 is expected, {recall} came")
        self._tokens = [token for token in trace.tokens if token.phase == DECODE]
        self._shape = shape
        self._recall = recall
        self._n_guessed = n_guessed
        self._seed = seed
        self._next = -n_prefill_tokens  # the sequence's token 0 is the first one decoded
        self._present: list[TokenRouting] = []

    def route(self, layer: int, step: Step) -> None:
        """Overwrite what the gate chose, with equal weights where the trace has none."""
        if layer == 0:
            n_tokens = step.expert_ids.shape[0]
            self._present = [
                self._tokens[(self._next + token) % len(self._tokens)] for token in range(n_tokens)
            ]  # before 0: the last ones of the trace
            self._next += n_tokens
        step.expert_ids.copy_(torch.tensor([token.expert_ids[layer] for token in self._present]))
        step.expert_weights.copy_(torch.tensor([self._weights(token, layer) for token in self._present]))

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterator[tuple[int, Guess]]:
        """Yield what is guessed for the next layer; the states say nothing."""
        del hidden_states
        if layer + 1 < self._shape.n_layers:
            yield layer + 1, partial(self._guess, layer + 1)

    def _guess(self, layer: int) -> Tensor:
        rows = [self._guessed(token.expert_ids[layer], layer, place) for place, token in enumerate(self._present)]
        return torch.tensor(rows)  # [T, n_guessed]

    def _guessed(self, true: Sequence[int], layer: int, place: int) -> list[int]:
        # A seed for each token and layer: what is guessed does not depend on how often it is asked.
        chance = random.Random(f"{self._seed} {self._next} {layer} {place}")  # noqa: S311  # no secret
        wrong = [expert for expert in range(self._shape.n_experts) if expert not in true]
        chance.shuffle(wrong)
        named = [expert if chance.random() < self._recall else wrong.pop() for expert in true]
        return (named + wrong)[: self._n_guessed]

    def _weights(self, token: TokenRouting, layer: int) -> Sequence[float]:
        if token.probabilities is None:
            return [1 / self._shape.top_k] * self._shape.top_k
        return token.probabilities[layer]


def check_fits(trace: Trace, shape: TraceShape) -> None:
    """Raise TraceInvalid unless the trace's decode tokens can be routed through a model of that shape."""
    came = trace.shape
    if came.n_layers < shape.n_layers or (came.n_experts, came.top_k) != (shape.n_experts, shape.top_k):
        raise TraceInvalid(
            f"a trace of {shape.n_layers} or more layers of {shape.n_experts} experts, {shape.top_k} a token, is "
            f"expected; it has {came.n_layers} layers of {came.n_experts}, {came.top_k} a token"
        )
    if not trace.n_decode_tokens:
        raise TraceInvalid("the trace has no decode tokens: there is nothing to route by")
