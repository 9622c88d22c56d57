"""How far one model's predictions are from another's on a text: what quantizing the one into the other cost.

The divergence is Kullback and Leibler's of the other from the reference, KL = Σ p (log p - log q) over the vocabulary,
in nats; the mean over the tokens that perplexity scores too.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.engine import Engine
from runner.errors import NotFinite, PromptInvalid, StoreInvalid
from runner.perplexity import Score, negative_log_likelihood, perplexity


@dataclass(frozen=True, slots=True)
class WindowDifference:
    """One window: what each model scored on it, and sums over its tokens."""

    reference: Score
    other: Score
    divergence_nats: float
    n_same_top: int  # tokens behind which both find the same one most probable


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole text: the other model beside the reference."""

    n_tokens: int
    reference_perplexity: float
    other_perplexity: float
    divergence_nats: float  # a token
    top_agreement: float  # of 1


def compare_windows(
    reference: Engine, other: Engine, token_ids: Sequence[int], window: int
) -> Iterator[WindowDifference]:
    """Yield the difference on each non-overlapping window of the text, each by itself; raise NotFinite.

    The first token of a window has nothing before it and is not scored; a window of one token is left out.
    """
    for start in range(0, len(token_ids), window):
        ids = token_ids[start : start + window]
        if len(ids) > 1:
            targets = torch.tensor(ids[1:])
            logits, others = reference.logits(ids)[:-1], other.logits(ids)[:-1]  # both [T, vocab]
            yield WindowDifference(
                Score(len(targets), negative_log_likelihood(logits, targets)),
                Score(len(targets), negative_log_likelihood(others, targets)),
                divergence(logits, others),
                int((logits.argmax(-1) == others.argmax(-1)).sum()),
            )


def divergence(logits: Tensor, others: Tensor) -> float:
    """Return the sum over T of KL(softmax(logits) || softmax(others)), both [T, vocab], in nats, added in fp64."""
    log_p, log_q = logits.log_softmax(-1), others.log_softmax(-1)
    nats = float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    if not math.isfinite(nats):
        raise NotFinite("a model computed logits that are no finite numbers")
    return nats


def summarize(differences: Iterable[WindowDifference]) -> Comparison:
    """Return the windows as one; raise PromptInvalid if none was scored."""
    windows = list(differences)
    n_tokens = sum(window.reference.n_tokens for window in windows)
    if not n_tokens:
        raise PromptInvalid("the text has fewer than two tokens; there is nothing to score")
    return Comparison(
        n_tokens=n_tokens,
        reference_perplexity=perplexity([window.reference for window in windows]),
        other_perplexity=perplexity([window.other for window in windows]),
        divergence_nats=sum(window.divergence_nats for window in windows) / n_tokens,
        top_agreement=sum(window.n_same_top for window in windows) / n_tokens,
    )


def common_tokens(reference: Engine, other: Engine, text: str) -> list[int]:
    """Return the text's tokens; raise StoreInvalid unless both stores have the same ones for it."""
    if reference.config.vocab_size != other.config.vocab_size:
        raise StoreInvalid(
            f"the stores cannot be compared: vocabularies of {reference.config.vocab_size} and of "
            f"{other.config.vocab_size} tokens"
        )
    token_ids, others = (engine.tokenizer.encode(text, add_special_tokens=False) for engine in (reference, other))
    if token_ids != others:
        raise StoreInvalid("the stores cannot be compared: their tokenizers cut the text differently")
    return token_ids
