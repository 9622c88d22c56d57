"""How fast an engine computes: prefill into an empty kv_cache, decode behind a context, on random tokens.

Token ids are drawn uniformly from the vocabulary, in decode too: what the model would have said does not matter, and
no tokenizer is needed. Only whole steps are timed; the context before a decode is computed once, and every run
continues from its end. One run more than is counted comes first, to warm up.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from quant.library import kernels_in_use
from runner.engine import Engine
from runner.experts.counters import Counters, counted_since
from runner.metrics import Memory, read_memory


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is measured: tokens of a prefill, tokens of context before a decode, tokens decoded; how often."""

    prompt_tokens: int = 128
    context_tokens: int = 512
    decode_tokens: int = 32
    runs: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, one sample a run."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return median(self.samples)


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured, and with what. A speed is None where its plan said 0 tokens."""

    plan: BenchPlan
    prefill: Speed | None
    decode: Speed | None
    outside_s: tuple[float, ...]  # of a decoded token: all but matrix products on the CPU, a sample a run
    n_threads: int
    is_exact: bool
    kernels: str | None  # of the C library; None without it
    memory: Memory
    expert_cache: Counters | None  # of all of it, the warming up too; None where experts are computed in place


def bench(engine: Engine, plan: BenchPlan) -> Bench:
    """Return the speeds of that plan; raise RunnerError."""
    generator = torch.Generator().manual_seed(plan.seed)
    counted_before = engine.counters
    with engine.awake():
        prefill = _prefill(engine, plan, generator) if plan.prompt_tokens else None
        decode, outside_s = _decode(engine, plan, generator) if plan.decode_tokens else (None, ())
    return Bench(
        plan=plan,
        prefill=prefill,
        decode=decode,
        outside_s=outside_s,
        n_threads=engine.n_threads,
        is_exact=engine.settings.exact,
        kernels=kernels_in_use(),
        memory=read_memory(),
        expert_cache=counted_since(counted_before, engine.counters),
    )


def _prefill(engine: Engine, plan: BenchPlan, generator: torch.Generator) -> Speed:
    samples = []
    for _ in range(1 + plan.runs):
        sequence = engine.new_sequence(plan.prompt_tokens)
        sequence.append(_random_tokens(engine, plan.prompt_tokens, generator))
        started = perf_counter()
        engine.step([sequence])
        samples.append(plan.prompt_tokens / (perf_counter() - started))
    return Speed(tuple(samples[1:]))


def _decode(engine: Engine, plan: BenchPlan, generator: torch.Generator) -> tuple[Speed, tuple[float, ...]]:
    """Return the speed, and each run's seconds a token outside of matrix products."""
    sequence = engine.new_sequence(plan.context_tokens + plan.decode_tokens)
    if plan.context_tokens:
        sequence.append(_random_tokens(engine, plan.context_tokens, generator))
        engine.step([sequence])
    samples, outside_s = [], []
    for _ in range(1 + plan.runs):
        token_ids = _random_tokens(engine, plan.decode_tokens, generator)
        started, products_before_s = perf_counter(), engine.products_s
        for token_id in token_ids:
            sequence.append([token_id])
            engine.step([sequence])
        elapsed_s = perf_counter() - started
        samples.append(plan.decode_tokens / elapsed_s)
        outside_s.append((elapsed_s - (engine.products_s - products_before_s)) / plan.decode_tokens)
        # Back to the end of the context: what lies behind `length` counts for nothing.
        sequence.kv_cache.length = plan.context_tokens
    return Speed(tuple(samples[1:])), tuple(outside_s[1:])


def _random_tokens(engine: Engine, n_tokens: int, generator: torch.Generator) -> list[int]:
    ids: list[int] = torch.randint(engine.config.vocab_size, (n_tokens,), generator=generator).tolist()
    return ids
