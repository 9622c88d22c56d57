"""Tokens on the GPU: the same whatever is cached, near the CPU's, and in no more memory than was planned.

For each number of experts kept of a layer a prompt is computed and continued greedily. With all of them kept nothing is
copied twice: those are the tokens that all others have to be. The logits of the prompt are compared with the CPU's in
fp32; where two experts are nearly as good, rounding chooses another one, so that the median over tokens says more than
the largest difference.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.steps import StepInput
from runner.engine import Engine, open_engine

_PROMPT_TOKENS = 96
_NEW_TOKENS = 48
_KEPT = (8, 7, 6, 5, 4, 3, 2)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Computed:
    """What one engine made of the prompt."""

    logits: Tensor
    token_ids: list[int]
    planned_nbytes: int | None
    hit_ratio: float | None


OpenEngine = Callable[[int], AbstractContextManager[Engine]]


def measure(given: StepInput) -> dict[str, object]:
    """Return what differs, and the most memory that was used beside what was planned."""
    with open_engine(given.small_store, device="cpu", exact=True) as engine:
        on_cpu = computed(engine).logits
    figures: dict[str, object] = {}
    reference: Computed | None = None
    for k in _KEPT:
        torch.cuda.reset_peak_memory_stats(0)
        came = on_device(partial(_opened, given), k)
        reference = reference or came
        used_nbytes = torch.cuda.max_memory_reserved(0)
        figures[f"k = {k}"] = compared(came, reference, on_cpu) | {
            "reserved_by_torch_mib": round(used_nbytes / _MIB, 1),
            "is_within_plan": came.planned_nbytes is not None and used_nbytes <= came.planned_nbytes,
            "used_by_all_processes_mib": round(_used_nbytes() / _MIB, 1),
        }
    return figures


def on_device(opened: OpenEngine, k: int) -> Computed:
    """Return what an engine that keeps so many experts of each layer computes."""
    with opened(k) as engine:
        return computed(engine)


def computed(engine: Engine) -> Computed:
    """Return the logits of the prompt and the tokens that follow it."""
    generator = torch.Generator().manual_seed(0)
    prompt: list[int] = torch.randint(3, engine.config.vocab_size, (_PROMPT_TOKENS,), generator=generator).tolist()
    logits = engine.logits(prompt)
    token_ids = list(engine.generate(prompt, max_new_tokens=_NEW_TOKENS))
    counters = engine.counters
    return Computed(logits, token_ids, engine.planned_nbytes, None if counters is None else counters.hit_ratio)


def compared(came: Computed, reference: Computed, on_cpu: Tensor) -> dict[str, object]:
    """Return how that differs from the reference, bit by bit, and from the CPU, in parts of its logits' range."""
    spread = float(on_cpu.max() - on_cpu.min())
    differences = ((came.logits - on_cpu).abs().amax(-1) / spread).tolist()
    return {
        "tokens_are_equal": came.token_ids == reference.token_ids,
        "logits_are_equal": torch.equal(came.logits, reference.logits),
        "from_cpu": {"median": round(median(differences), 6), "largest": round(max(differences), 6)},
        "hit_ratio": None if came.hit_ratio is None else round(came.hit_ratio, 4),
        "planned_mib": None if came.planned_nbytes is None else round(came.planned_nbytes / _MIB, 1),
    }


def _used_nbytes() -> int:
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(0)
    return total_nbytes - free_nbytes


def _opened(given: StepInput, k: int) -> AbstractContextManager[Engine]:
    return open_engine(given.small_store, device="cuda:0", cache_experts=k)
