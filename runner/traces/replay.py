"""A policy on a recorded trace: how often a token's experts would have been in their layer's slots. Pure.

What a step chose is looked up before any of it is fetched, and nothing that the step needs is evicted for it. The
prefill's experts, put into the slots in ascending order, are what the first decode token finds; only decode tokens are
counted. Nothing is prefetched: a miss is fetched when it is asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.errors import ConfigInvalid
from runner.experts.policies import LFU, LRU, Belady, Policy, Random
from runner.traces.errors import TraceInvalid
from runner.traces.record import DECODE, Phase, Trace

POLICIES = ("lru", "lfu", "random", "belady")

_Step = tuple[Phase, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class HitRatio:
    """How many of the experts that decode tokens asked for lay in slots: layer by layer, of n_lookups in each."""

    n_hits: tuple[int, ...]
    n_lookups: int

    @property
    def by_layer(self) -> tuple[float, ...]:
        """Return each layer's share."""
        return tuple(n_hits / self.n_lookups for n_hits in self.n_hits)

    @property
    def overall(self) -> float:
        """Return the share over all layers."""
        return sum(self.n_hits) / (self.n_lookups * len(self.n_hits))


def replay(trace: Trace, policy: str, cache_experts: int, *, seed: int = 0) -> HitRatio:
    """Return the hits of that policy with so many slots a layer; raise ConfigInvalid or TraceInvalid.

    `policy` is one of POLICIES; `seed` is where random numbers start.
    """
    shape = trace.shape
    if policy not in POLICIES:
        raise ConfigInvalid(f"policy: one of {', '.join(POLICIES)} is expected, {policy!r:.40} came")
    if not shape.top_k <= cache_experts <= shape.n_experts:
        raise ConfigInvalid(
            f"--cache-experts: {shape.top_k} (a token's experts) to {shape.n_experts} (all of a layer's) are expected, "
            f"{cache_experts} came"
        )
    if not trace.n_decode_tokens:
        raise TraceInvalid("the trace has no decode tokens: there is nothing to count")
    n_hits = []
    for layer in range(shape.n_layers):
        steps = list(trace.steps(layer))
        n_hits.append(_count_hits(steps, _new_policy(policy, steps, seed + layer), cache_experts))
    return HitRatio(tuple(n_hits), trace.n_decode_tokens * shape.top_k)


def _new_policy(name: str, steps: Sequence[_Step], seed: int) -> Policy:
    if name == "lru":
        return LRU()
    if name == "lfu":
        return LFU()
    if name == "random":
        return Random(seed)
    return Belady([experts for _, experts in steps])


def _count_hits(steps: Iterable[_Step], policy: Policy, n_slots: int) -> int:
    """Return how many of the decode tokens' experts lay in that layer's slots."""
    cached: set[int] = set()
    n_hits = 0
    for phase, experts in steps:
        policy.use(experts)
        if phase == DECODE:
            n_hits += len(cached.intersection(experts))
        # A prefill's experts pass through the slots one after another: the last ones stay.
        _fetch(experts[-n_slots:], cached, policy, n_slots)
    return n_hits


def _fetch(experts: Iterable[int], cached: set[int], policy: Policy, n_slots: int) -> None:
    """Put the experts that are not there into slots, in the place of others where none is free."""
    evictable = cached.difference(experts)
    for expert in experts:
        if expert in cached:
            continue
        if len(cached) == n_slots:
            victim = policy.victim(evictable)
            evictable.remove(victim)
            cached.remove(victim)
            policy.remove(victim)
        cached.add(expert)
        policy.add(expert)
