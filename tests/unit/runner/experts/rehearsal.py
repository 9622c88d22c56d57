"""A random sequence of calls, made of experts in place and of a cache on a strict device, in an order from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quant.workspace import Workspace
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from runner.experts.cache import CachedExperts, CacheMode, CacheSettings
from runner.experts.compute import CExperts
from runner.experts.counters import Counters
from runner.experts.in_place import InPlaceExperts
from tests.unit.runner.experts.interleaving import Interleaving, SteppedLock
from tests.unit.runner.experts.tiny_store import HIDDEN, N_EXPERTS, N_LAYERS, RECORD_NBYTES, TOP_K, TinyStore
from tests.unit.runner.experts.watched_device import WatchedDevice

Guess = Callable[[random.Random, list[int]], list[int]]

GUESSES: dict[str, Guess] = {
    "none": lambda *_: [],
    "right": lambda _, true: true[:3],
    "wrong": lambda _, true: [expert for expert in range(N_EXPERTS) if expert not in true][:2],
    "random": lambda generator, _: generator.sample(range(N_EXPERTS), 2),
}


@dataclass(frozen=True)
class Step:
    """One call of one layer."""

    layer: int
    hidden_states: Tensor
    expert_ids: Tensor
    weights: Tensor

    @property
    def experts(self) -> list[int]:
        return sorted(set(self.expert_ids.flatten().tolist()))


@dataclass(frozen=True)
class Rehearsed:
    """What the cache returned, and what it counted."""

    outputs: list[Tensor]
    counters: Counters


def random_steps(seed: int, n_steps: int = 5, *, prefills: bool = True) -> list[Step]:
    """Return steps through all layers: of one token, or of up to twelve."""
    generator = torch.Generator().manual_seed(seed)
    chooser = random.Random(seed)
    steps = []
    for _ in range(n_steps):
        n_tokens = chooser.choice((1, 1, 2, 12)) if prefills else 1
        for layer in range(N_LAYERS):
            hidden_states = torch.randn(n_tokens, HIDDEN, generator=generator)
            logits, expert_ids = torch.randn(n_tokens, N_EXPERTS, generator=generator).topk(TOP_K)
            steps.append(Step(layer, hidden_states, expert_ids, logits.softmax(-1)))
    return steps


def computed_in_place(steps: list[Step]) -> list[Tensor]:
    """Return what experts in place return for the steps."""
    with Workspace() as workspace:
        experts = InPlaceExperts(TinyStore(), workspace)
        return [experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights) for step in steps]


def settings_of(seed: int, k: int, mode: CacheMode = CacheMode.CACHED) -> CacheSettings:
    """Return settings with k slots a layer; the rest is the seed's."""
    chooser = random.Random(seed)
    return CacheSettings(
        quotas=(k,) * N_LAYERS,
        n_spares=chooser.choice((0, 1, 2, 4)),
        mode=mode,
        chunk_nbytes=chooser.choice((RECORD_NBYTES // 3, RECORD_NBYTES)),
        is_direct=chooser.random() < 0.3,
        waits=chooser.random() < 0.5,
    )


def rehearse(
    seed: int,
    steps: list[Step],
    settings: CacheSettings,
    guess: str = "none",
    leaves_out: Callable[[str, str], bool] = lambda _call, _name: False,
) -> Rehearsed:
    """Return what the cache returns for the steps, in an order of the queues and the engine that is the seed's."""
    chooser = random.Random(seed)
    with Interleaving(seed, leaves_out) as interleaving, Workspace() as workspace:
        device = LinkDevice(LinkSpeed(1e12), strict=True, scheduler=RandomScheduler(seed))
        watched = WatchedDevice(device, interleaving.before_call)
        compute = CExperts(TinyStore().manifest, workspace)
        experts = CachedExperts(TinyStore(), watched, compute, settings, stepped_by=interleaving.step)
        interleaving.engine = experts._engine
        experts._lock = SteppedLock(experts._lock, interleaving)  # type: ignore[assignment]
        outputs = []
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if following is not None:
                guessed = torch.tensor(GUESSES[guess](chooser, following.experts), dtype=torch.int64)
                experts.prefetch(following.layer, partial(torch.clone, guessed))
            outputs.append(experts.forward(step.layer, step.hidden_states, step.expert_ids, step.weights))
        experts.close()
        device.close()
        return Rehearsed(outputs, experts.counters)
