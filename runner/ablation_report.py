"""How an ablation looks: a table for people, an object for programs. Pure."""

from dataclasses import asdict

from runner.ablation import Ablation, RowResult

_MB = 1e6
_COLUMNS = (
    "tok/s",
    "of bound",
    "x naive",
    "hit ratio",
    "MB/token",
    "waited ms",
    "prefetched",
    "used",
    "late",
    "wasted",
)


def ablation_lines(ablation: Ablation) -> list[str]:
    """Return the lines a person reads: what was measured, then a row for each way to run."""
    plan = ablation.plan
    cached = "all" if ablation.cache_experts is None else str(ablation.cache_experts)
    if ablation.device_memory is not None:
        cached = f"what {ablation.device_memory / _MB:.0f} MB hold"
    speed = "" if ablation.bytes_per_s is None else f" at {ablation.bytes_per_s / 1e9:.3g} GB/s"
    lines = [
        f"{ablation.device}{speed}, experts of {ablation.slot_nbytes / _MB:.2f} MB, {cached} kept of each layer",
        f"{plan.decode_tokens} tokens behind {plan.context_tokens}, median of {plan.runs} runs; all logits are equal"
        + ("" if plan.trace is None else f"; routing from a trace, recall {plan.recall:.2f}"),
        "",
        f"{'':<12}" + "".join(f"{name:>11}" for name in _COLUMNS),
    ]
    return lines + [_line(ablation, result) for result in ablation.results]


def ablation_figures(ablation: Ablation) -> dict[str, object]:
    """Return all of it as one JSON object."""
    plan = ablation.plan
    return {
        "device": ablation.device,
        "bytes_per_s": ablation.bytes_per_s,
        "slot_nbytes": ablation.slot_nbytes,
        "cache_experts": ablation.cache_experts,
        "device_memory": ablation.device_memory,
        "context_tokens": plan.context_tokens,
        "decode_tokens": plan.decode_tokens,
        "runs": plan.runs,
        "seed": plan.seed,
        "is_routing_forced": plan.trace is not None,
        "recall": plan.recall if plan.trace is not None else None,
        "rows": {result.row.value: _figures(ablation, result) for result in ablation.results},
    }


def _figures(ablation: Ablation, result: RowResult) -> dict[str, object]:
    return {
        "tokens_per_s": 1 / result.step_s,
        "step_s_samples": [run.step_s for run in result.runs],
        "share_of_bound": ablation.share_of_bound(result),
        "times_naive": ablation.times_naive(result),
        "hit_ratio": result.counters.hit_ratio,
    } | asdict(result.counters)


def _line(ablation: Ablation, result: RowResult) -> str:
    counters, n_tokens = result.counters, ablation.plan.decode_tokens
    cells = (
        f"{1 / result.step_s:.2f}",
        _shown(ablation.share_of_bound(result), 3),
        _shown(ablation.times_naive(result), 2),
        _shown(counters.hit_ratio, 3),
        f"{counters.copied_nbytes / _MB / n_tokens:.1f}",
        f"{counters.waited_s * 1e3 / n_tokens:.2f}",
        f"{counters.prefetches_issued}",
        f"{counters.prefetches_used}",
        f"{counters.prefetches_late}",
        f"{counters.prefetches_wasted + counters.prefetches_cancelled}",
    )
    return f"{result.row.value:<12}" + "".join(f"{cell:>11}" for cell in cells)


def _shown(ratio: float | None, n_digits: int) -> str:
    return "-" if ratio is None else f"{ratio:.{n_digits}f}"
