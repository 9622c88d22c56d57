"""The same tokens decoded again and again by one engine: with the gates' own guesses, or with those of whoever knows.

Letters: T tokens.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from quant.segment import Step
from runner.engine import Engine
from runner.experts.counters import Counters
from runner.experts.source import Guess

Choices = list[list[list[int]]]  # by token and layer


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding took, without the tokens before, and what came of it."""

    n_tokens: int
    seconds: float
    counters: Counters | None
    digest: str  # of all logits
    read_nbytes: int = 0  # by whoever reads, and whether it was used or not

    @property
    def token_s(self) -> float:
        """Seconds a token."""
        return self.seconds / self.n_tokens

    @property
    def token_nbytes(self) -> float:
        """Bytes a token that were read."""
        return self.read_nbytes / self.n_tokens

    @property
    def recall(self) -> float:
        """The share of the misses that had been foreseen."""
        counters = self.counters
        return counters.prefetches_used / counters.misses if counters is not None and counters.misses else 0.0


class Recorder:
    """A LayerObserver that keeps what every layer chose for the one token of a step."""

    def __init__(self) -> None:
        self.choices: Choices = []

    def after_layer(self, layer: int, step: Step) -> None:
        """Keep it."""
        if layer == 0:
            self.choices.append([])
        self.choices[-1].append(step.expert_ids[0].tolist())


class Oracle:
    """A Routing that leaves the choice to the gates, and guesses what it was when it was recorded.

    Each expert is named with the probability `recall`; in the place of one that is not stands another.
    """

    def __init__(self, choices: Choices, n_experts: int, *, depth: int, recall: float) -> None:
        self._choices = choices
        self._n_experts = n_experts
        self._depth = depth
        self._recall = recall
        self._token = -1

    def route(self, layer: int, step: Step) -> None:  # noqa: ARG002  # a Routing's
        """Note where the computation is; choose nothing."""
        if layer == 0:
            self._token += 1

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterator[tuple[int, Guess]]:
        """Yield the layers ahead with what they will choose, or not."""
        del hidden_states
        chosen = self._choices[self._token]
        for ahead in range(layer + 1, min(layer + 1 + self._depth, len(chosen))):
            yield ahead, partial(self._guess, ahead)

    def _guess(self, layer: int) -> Tensor:
        true = self._choices[self._token][layer]
        # The same for every layer from which it is guessed.
        chance = random.Random(f"{self._token} {layer}")  # noqa: S311  # no secret
        wrong = [expert for expert in range(self._n_experts) if expert not in true]
        chance.shuffle(wrong)
        return torch.tensor([[expert if chance.random() < self._recall else wrong.pop() for expert in true]])


def decode(
    engine: Engine,
    token_ids: Sequence[int],
    n_before: int,
    *,
    oracle: Oracle | None = None,
    read_nbytes: Callable[[], int] = lambda: 0,
) -> Decoded:
    """Return what decoding the tokens behind the first `n_before` took, which are decoded too.

    `read_nbytes` says how many bytes have been read until now.
    """
    sequence = engine.new_sequence(len(token_ids))
    digest = hashlib.sha256()
    seconds, before, read_before = 0.0, engine.counters, 0
    with ExitStack() as stack:
        stack.enter_context(engine.awake())
        if oracle is not None:
            stack.enter_context(engine.routed_by(oracle))
        for place, token_id in enumerate(token_ids):
            if place == n_before:
                before, read_before = engine.counters, read_nbytes()
            sequence.append([token_id])
            began_s = perf_counter()
            logits = engine.step([sequence])
            seconds += perf_counter() - began_s if place >= n_before else 0.0
            digest.update(logits.numpy().tobytes())
    after = engine.counters
    counted = None if before is None or after is None else after - before
    n_tokens = len(token_ids) - n_before
    return Decoded(n_tokens, seconds, counted, digest.hexdigest(), read_nbytes() - read_before)


def record(engine: Engine, token_ids: Sequence[int]) -> Choices:
    """Return what the gates choose for these tokens."""
    recorder = Recorder()
    sequence = engine.new_sequence(len(token_ids))
    with engine.observed_by(recorder):
        for token_id in token_ids:
            sequence.append([token_id])
            engine.step([sequence])
    return recorder.choices
