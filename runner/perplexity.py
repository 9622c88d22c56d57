"""How well the model predicts a text: the exponential of the mean negative log probability of its tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.engine import Engine
from runner.errors import NotFinite, PromptInvalid


@dataclass(frozen=True, slots=True)
class Score:
    """The tokens of one window that were scored, and the sum of their negative log probabilities, in nats."""

    n_tokens: int
    nats: float


def score_windows(engine: Engine, token_ids: Sequence[int], window: int) -> Iterator[Score]:
    """Yield the score of each non-overlapping window of the text, each by itself; raise NotFinite.

    The first token of a window has nothing before it and is not scored; a window of one token is left out.
    """
    for start in range(0, len(token_ids), window):
        ids = token_ids[start : start + window]
        if len(ids) > 1:
            yield Score(len(ids) - 1, negative_log_likelihood(engine.logits(ids)[:-1], torch.tensor(ids[1:])))


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Return the sum over T of -log softmax(logits [T, vocab])[targets [T]], in nats, added in fp64."""
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    nats = float((logits.logsumexp(-1) - chosen).double().sum())
    if not math.isfinite(nats):
        raise NotFinite("the model computed logits that are no finite numbers")
    return nats


def perplexity(scores: Sequence[Score]) -> float:
    """Return exp of the nats per token over all windows; raise PromptInvalid if none was scored."""
    n_tokens = sum(score.n_tokens for score in scores)
    if not n_tokens:
        raise PromptInvalid("the text has fewer than two tokens; there is nothing to score")
    mean = sum(score.nats for score in scores) / n_tokens
    # Beyond what a double holds the model predicts nothing at all.
    return math.exp(mean) if mean < 700 else math.inf
