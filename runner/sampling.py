"""Which token comes next: from logits to one token id. Pure but for the generator that is passed in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.errors import NotFinite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the most probable one; top_k None draws from all."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id of the next token for logits fp32 [vocab]; raise NotFinite."""
    lowest, highest = logits.aminmax()  # in one pass; a NaN anywhere makes both one
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise NotFinite(
            "the model computed logits that are no finite numbers: --exact rules out that the 16-bit kv_cache "
            "overflows, `expertd verify` that the store is damaged"
        )
    if not sampling.temperature:
        return int(logits.argmax())
    kept, token_ids = keep_most_probable(logits / sampling.temperature, sampling)
    place = torch.multinomial(kept.softmax(-1), 1, generator=generator)
    return int(token_ids[place])


def keep_most_probable(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the logits that may be drawn, in falling order, and their token ids, both [n_kept].

    top_k keeps the k highest; of these top_p keeps the fewest that together have that probability, at least one
    (nucleus sampling, Holtzman et al., 2020).
    """
    n_kept = min(sampling.top_k or logits.shape[0], logits.shape[0])
    kept, token_ids = logits.topk(n_kept)
    if sampling.top_p < 1.0:
        probabilities = kept.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the probability of all that are likelier
        n_kept = max(1, int((before < sampling.top_p).sum()))
    return kept[:n_kept], token_ids[:n_kept]
