"""What each part of the expert cache is worth: the four rows of the paper's ablation, on any device with slots.

    resident    every expert of every layer has a slot: what computing takes, and all that copies could be hidden behind
    full        the cache and prefetching, as they are used
    no prefetch the cache alone
    no cache    nothing is kept between two tokens: experts are copied when they are chosen
    naive       all of a layer's experts are copied, then those chosen are computed

(Eliseev and Mazur, arXiv 2312.17238, table 2.) All rows compute the same tokens behind the same context, row by row in
turn, and have to return the same logits. A row cannot be faster than its bound: the longer of what computing takes, the
resident row's time, and of what copying its misses takes at the link's speed; nothing that is copied in vain counts.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from time import perf_counter

import torch

from protocol.manifest import Manifest
from runner.config import RunnerConfig
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LINK_PREFIX, LinkSpeed
from runner.engine import Engine
from runner.errors import ConfigInvalid, RunnerError
from runner.experts.cache import CacheMode
from runner.experts.counters import Counters
from runner.models.opening import CachePlan
from runner.traces.forced import ForcedRouting
from runner.traces.record import Trace, TraceShape

# Decoded before anything is counted: the cache is warm then, and prefetching has been decided on.
_N_WARM_UP = 64

NO_SLOTS = ConfigInvalid("--device: one with slots is expected, as in link:12GB/s; on the CPU nothing is copied")


class Row(Enum):
    """One way to run."""

    RESIDENT = "resident"
    FULL = "full"
    NO_PREFETCH = "no prefetch"
    NO_CACHE = "no cache"
    NAIVE = "naive"


ROWS = tuple(Row)


@dataclass(frozen=True, slots=True)
class AblationPlan:
    """What is computed: decoded tokens behind a context, how often; which tokens, and who routes them.

    `token_ids`: context, warm-up and decoded tokens; None draws them from the vocabulary. `trace` routes them instead
    of the gates, and guesses are then right as often as `recall` says.
    """

    context_tokens: int = 64
    decode_tokens: int = 64
    runs: int = 3
    seed: int = 0
    token_ids: Sequence[int] | None = None
    trace: Trace | None = None
    recall: float = 1.0
    rows: tuple[Row, ...] = ROWS

    @property
    def n_tokens(self) -> int:
        """How many tokens a row computes in one run."""
        return self.context_tokens + _N_WARM_UP + self.decode_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one row, without its warm-up."""

    step_s: float  # a token
    counters: Counters
    digest: str  # of all logits


@dataclass(slots=True)
class RowResult:
    """What a row took; counters are the last run's, for all of its tokens."""

    row: Row
    runs: list[Measured] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """The median run's seconds a token."""
        return median(run.step_s for run in self.runs)

    @property
    def counters(self) -> Counters:
        """What was counted in the last run."""
        return self.runs[-1].counters


@dataclass(frozen=True, slots=True)
class Ablation:
    """All rows, and what the bounds are made of."""

    plan: AblationPlan
    device: str
    cache_experts: int | None
    device_memory: int | None
    bytes_per_s: float | None  # None: not known, and no row has a bound
    slot_nbytes: int
    results: tuple[RowResult, ...]

    def result(self, row: Row) -> RowResult | None:
        """Return that row, if it was measured."""
        return next((result for result in self.results if result.row is row), None)

    def times_naive(self, result: RowResult) -> float | None:
        """Return how many times faster than the naive way a row is; None without that one."""
        naive = self.result(Row.NAIVE)
        return None if naive is None else naive.step_s / result.step_s

    def share_of_bound(self, result: RowResult) -> float | None:
        """Return the least a token of that row can take, over what it takes; None if the bound is not known."""
        resident = self.result(Row.RESIDENT)
        if self.bytes_per_s is None or resident is None:
            return None
        n_misses = result.counters.misses / self.plan.decode_tokens
        return max(resident.step_s, n_misses * self.slot_nbytes / self.bytes_per_s) / result.step_s


def measure_ablation(
    opened: Callable[[RunnerConfig, CachePlan], AbstractContextManager[Engine]],
    settings: RunnerConfig,
    plan: AblationPlan,
    *,
    bytes_per_s: float | None,
    on_run: Callable[[Row], None] = lambda _: None,
) -> Ablation:
    """Return all rows; `opened` opens an engine of the store. Raise RunnerError, also if two rows' logits differ."""
    results = {row: RowResult(row) for row in plan.rows}
    slot_nbytes = 0
    for _ in range(plan.runs):
        for row in plan.rows:
            on_run(row)
            with opened(*_of_row(row, settings)) as engine:
                slot_nbytes = max(record.nbytes for record in engine.store.manifest.experts.values())
                results[row].runs.append(_measured(engine, plan, settings))
    _check_same_logits(results)
    return Ablation(
        plan=plan,
        device=settings.device,
        cache_experts=settings.cache_experts,
        device_memory=settings.device_memory,
        bytes_per_s=bytes_per_s,
        slot_nbytes=slot_nbytes,
        results=tuple(results.values()),
    )


def measure_compute_s(
    opened: Callable[[RunnerConfig, CachePlan], AbstractContextManager[Engine]],
    settings: RunnerConfig,
    plan: AblationPlan,
) -> float:
    """Return what a token of the resident row takes, in seconds: the fastest run."""
    runs = []
    for _ in range(plan.runs):
        with opened(*_of_row(Row.RESIDENT, settings)) as engine:
            runs.append(_measured(engine, plan, settings).step_s)
    return min(runs)


def naive_speed(manifest: Manifest, compute_s: float, naive_to_compute: float) -> str:
    """Return the link at which all experts of all layers are copied in the time that is left of the naive way's."""
    nbytes = sum(record.nbytes for record in manifest.experts.values())
    return f"{LINK_PREFIX}{nbytes / (compute_s * (naive_to_compute - 1)) / 1e6:.3f}MB/s"


def _of_row(row: Row, settings: RunnerConfig) -> tuple[RunnerConfig, CachePlan]:
    modes = {Row.NO_CACHE: CacheMode.UNCACHED, Row.NAIVE: CacheMode.NAIVE}
    if row is not Row.FULL:
        settings = replace(settings, prefetch_depth=0)
    if row is Row.RESIDENT:
        # What is copied once, at first use, is not what this row measures.
        return settings, CachePlan(holds_all=True, new_device=lambda _: LinkDevice(LinkSpeed(math.inf)))
    return settings, CachePlan(mode=modes.get(row, CacheMode.CACHED))


def _measured(engine: Engine, plan: AblationPlan, settings: RunnerConfig) -> Measured:
    token_ids = _token_ids(engine, plan)
    sequence = engine.new_sequence(plan.n_tokens)
    digest = hashlib.sha256()
    with engine.awake(), _routed(engine, plan, settings):
        sequence.append(token_ids[: plan.context_tokens])
        engine.step([sequence])
        step_s = 0.0
        before = engine.counters
        for place, token_id in enumerate(token_ids[plan.context_tokens :]):
            if place == _N_WARM_UP:
                before = engine.counters
            sequence.append([token_id])
            began_s = perf_counter()
            logits = engine.step([sequence])
            took_s = perf_counter() - began_s
            step_s += took_s if place >= _N_WARM_UP else 0.0
            digest.update(logits.numpy().tobytes())
        after = engine.counters
    if before is None or after is None:
        raise NO_SLOTS
    return Measured(step_s / plan.decode_tokens, after - before, digest.hexdigest())


def _token_ids(engine: Engine, plan: AblationPlan) -> Sequence[int]:
    if plan.token_ids is not None:
        if len(plan.token_ids) < plan.n_tokens:
            raise ConfigInvalid(f"--text: {plan.n_tokens} tokens are expected, {len(plan.token_ids)} came")
        return plan.token_ids[: plan.n_tokens]
    generator = torch.Generator().manual_seed(plan.seed)
    ids: list[int] = torch.randint(engine.config.vocab_size, (plan.n_tokens,), generator=generator).tolist()
    return ids


@contextmanager
def _routed(engine: Engine, plan: AblationPlan, settings: RunnerConfig) -> Iterator[None]:
    if plan.trace is None:
        yield
        return
    config = engine.config
    forced = ForcedRouting(
        plan.trace,
        TraceShape(config.n_layers, config.n_experts, config.top_k),
        n_prefill_tokens=plan.context_tokens,
        recall=plan.recall,
        n_guessed=settings.prefetch_experts,
        seed=plan.seed,
    )
    with engine.routed_by(forced):
        yield


def _check_same_logits(results: dict[Row, RowResult]) -> None:
    digests = {run.digest for result in results.values() for run in result.runs}
    if len(digests) != 1:
        raise RunnerError(f"the rows' logits differ: {len(digests)} different results where one is expected")
