"""A routing trace: for every token and layer the experts it chose. Knows no policy and no model.

The tokens of a prefill are computed together before the first decode step: what they chose warms the caches, and is
counted nowhere. Every decode token is a step of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]
PREFILL: Phase = "prefill"
DECODE: Phase = "decode"

# One layer's experts in each of a token's layers: [n_layers][top_k], and more in a prefill whose tokens were merged.
ExpertsByLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TraceShape:
    """The model whose tokens were routed."""

    n_layers: int
    n_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """What one token chose in every layer: experts in the gate's order, and the weights the gate gave them.

    Where the gate's order is lost, experts are in ascending order and probabilities are None. A prefill token may
    stand for several: it then has all that they chose.
    """

    phase: Phase
    expert_ids: ExpertsByLayer
    probabilities: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Tokens in the order in which they were computed."""

    shape: TraceShape
    tokens: tuple[TokenRouting, ...]

    @property
    def n_decode_tokens(self) -> int:
        """How many tokens were a step of their own."""
        return sum(token.phase == DECODE for token in self.tokens)

    def steps(self, layer: int) -> Iterator[tuple[Phase, tuple[int, ...]]]:
        """Yield one layer's steps: what a decode token chose; or what a whole prefill did, in ascending order."""
        prefill: set[int] = set()
        for token in self.tokens:
            if token.phase == PREFILL:
                prefill.update(token.expert_ids[layer])
                continue
            if prefill:
                yield PREFILL, tuple(sorted(prefill))
                prefill = set()
            yield DECODE, token.expert_ids[layer]
        if prefill:
            yield PREFILL, tuple(sorted(prefill))
