"""How local a trace's routing is: what neighbouring tokens share, and what a cache of k experts a layer makes of it.

Beside each number stands what chance gives, since what is much for 8 experts is little for 2. Knows traces only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from runner.traces.errors import TraceInvalid
from runner.traces.record import DECODE, Trace, TraceShape
from runner.traces.replay import replay

# Sizes of caches and counts of guesses beyond so many say little more.
_N_SIZES_MAX = 16


@dataclass(frozen=True, slots=True)
class HitCurve:
    """The hit ratio of one policy for each size of cache."""

    policy: str
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Locality:
    """The locality of a trace's decode tokens.

    overlap          the share of a token's experts that the token before chose too, over all layers; by chance
                     it is top_k / n_experts. None for a single token
    cache_experts    the sizes that the curves are for, in experts a layer
    uniform          the hit ratio for each size if every expert were asked for as often as any other
    """

    shape: TraceShape
    n_tokens: int
    overlap: float | None
    overlap_by_chance: float
    cache_experts: tuple[int, ...]
    curves: tuple[HitCurve, ...]
    uniform: tuple[float, ...]


def measure_locality(trace: Trace, policies: Sequence[str], cache_experts: Sequence[int] = ()) -> Locality:
    """Return the trace's locality, for all sizes of cache if none are named; raise TraceInvalid or ConfigInvalid."""
    shape = trace.shape
    sizes = tuple(cache_experts) or all_sizes(shape)
    curves = tuple(HitCurve(policy, tuple(replay(trace, policy, k).overall for k in sizes)) for policy in policies)
    return Locality(
        shape=shape,
        n_tokens=trace.n_decode_tokens,
        overlap=adjacent_overlap(trace),
        overlap_by_chance=shape.top_k / shape.n_experts,
        cache_experts=sizes,
        curves=curves,
        uniform=tuple(k / shape.n_experts for k in sizes),
    )


def all_sizes(shape: TraceShape) -> tuple[int, ...]:
    """Return the sizes from top_k to all experts but one, at most some sixteen of them."""
    n_sizes = max(1, shape.n_experts - shape.top_k)
    return tuple(range(shape.top_k, shape.top_k + n_sizes, -(-n_sizes // _N_SIZES_MAX)))


def adjacent_overlap(trace: Trace) -> float | None:
    """Return the share of a decode token's experts that the decode token before it chose, None for fewer than two.

    Raise TraceInvalid if there is no decode token at all.
    """
    tokens = [token.expert_ids for token in trace.tokens if token.phase == DECODE]
    if not tokens:
        raise TraceInvalid("the trace has no decode tokens: there is nothing to count")
    if len(tokens) == 1:
        return None
    n_shared = sum(
        len(set(before).intersection(now))
        for token_before, token in pairwise(tokens)
        for before, now in zip(token_before, token, strict=True)
    )
    return n_shared / ((len(tokens) - 1) * trace.shape.n_layers * trace.shape.top_k)
