"""How a report looks: lines for people, an object for programs. Pure."""

import math
from dataclasses import asdict
from statistics import median

from runner.bench import Bench, Speed
from runner.comparison import Comparison
from runner.experts.counters import Counters
from runner.generate import Report

_MB = 1e6


def report_lines(report: Report) -> list[str]:
    """Return the lines a person reads behind the text."""
    memory = report.memory
    lines = [
        f"prompt {report.n_prompt_tokens} tokens, {_rate(report.prefill_tokens_per_s)} · "
        f"answer {report.n_tokens} tokens, {_rate(report.decode_tokens_per_s)} · ended by {report.finish_reason}",
        f"memory: private {memory.private_nbytes / _MB:.0f} MB, shared {memory.shared_nbytes / _MB:.0f} MB",
    ]
    if report.expert_cache is not None:
        lines += cache_lines(report.expert_cache)
    if report.time_to_first_token_s is not None and report.prefill_s is not None:
        lines.append(
            f"first token {report.time_to_first_token_s:.2f} s after the start: imports {report.imports_s:.2f}, "
            f"attach {report.attach_s:.3f}, dense weights {report.dense_weights_s:.2f}, "
            f"tokenizer {report.tokenizer_s:.2f}, prefill {report.prefill_s:.2f}"
        )
    if report.seed is not None:
        lines.append(f"seed {report.seed}")
    if not report.has_c_kernels:
        lines.append(
            "no C kernels: expertd was installed without a C compiler, so this took several times longer than it "
            "would; install one, and expertd again"
        )
    return lines


def report_figures(report: Report) -> dict[str, object]:
    """Return the report as one flat JSON object."""
    figures: dict[str, object] = asdict(report)
    del figures["memory"], figures["expert_cache"]
    return figures | asdict(report.memory) | _cache_figures(report.expert_cache)


def perplexity_figures(value: float, *, n_tokens_scored: int, window: int, tokens_per_s: float) -> dict[str, object]:
    """Return a measured perplexity as one flat JSON object; JSON has no infinity, so that is null."""
    return {
        "perplexity": value if math.isfinite(value) else None,
        "n_tokens_scored": n_tokens_scored,
        "window": window,
        "tokens_per_s": tokens_per_s,
    }


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the lines a person reads of two stores compared."""
    a, b = comparison.reference_perplexity, comparison.other_perplexity
    return [
        f"KL divergence {comparison.divergence_nats:.5f} nats a token · same most probable token "
        f"{comparison.top_agreement:.2%} · {comparison.n_tokens} tokens",
        f"perplexity {a:.4f} and {b:.4f}, {b / a - 1:+.2%}",
    ]


def comparison_figures(comparison: Comparison, *, window: int) -> dict[str, object]:
    """Return two stores compared as one flat JSON object; JSON has no infinity, so that is null."""
    figures: dict[str, object] = {
        name: value if math.isfinite(value) else None for name, value in asdict(comparison).items()
    }
    return figures | {"window": window}


def bench_lines(bench: Bench) -> list[str]:
    """Return the lines a person reads of measured speeds."""
    plan, memory = bench.plan, bench.memory
    lines = []
    if bench.prefill is not None:
        lines.append(f"prefill of {plan.prompt_tokens} tokens: {_spread(bench.prefill)}")
    if bench.decode is not None:
        behind = f"decode of {plan.decode_tokens} tokens behind {plan.context_tokens}"
        lines.append(f"{behind}: {_spread(bench.decode)}")
        lines.append(f"  of a token {median(bench.outside_s) * 1e3:.2f} ms outside of matrix products")
    kernels = "no C kernels" if bench.kernels is None else f"{bench.kernels} kernels"
    lines.append(
        f"{bench.n_threads} threads, {kernels}{', exact' if bench.is_exact else ''} · "
        f"memory: private {memory.private_nbytes / _MB:.0f} MB, shared {memory.shared_nbytes / _MB:.0f} MB"
    )
    if bench.expert_cache is not None:
        lines += cache_lines(bench.expert_cache)
    return lines


def cache_lines(counters: Counters) -> list[str]:
    """Return the lines a person reads of what an expert cache counted."""
    ratio = "-" if counters.hit_ratio is None else f"{counters.hit_ratio:.3f}"
    return [
        f"expert cache: hit ratio {ratio}, {counters.misses} misses · copied {counters.copied_nbytes / _MB:.0f} MB, "
        f"waited {counters.waited_s:.2f} s",
        f"prefetches: {counters.prefetches_issued} issued, {counters.prefetches_used} used "
        f"({counters.prefetches_late} late), {counters.prefetches_cancelled} cancelled, "
        f"{counters.prefetches_wasted} wasted",
    ]


def bench_figures(bench: Bench) -> dict[str, object]:
    """Return measured speeds as one JSON object: what was asked, what was used, every sample."""
    return (
        asdict(bench.plan)
        | {"threads": bench.n_threads, "exact": bench.is_exact, "kernels": bench.kernels}
        | asdict(bench.memory)
        | _cache_figures(bench.expert_cache)
        | _speed_figures("prefill", bench.prefill)
        | _speed_figures("decode", bench.decode)
        | {"decode_outside_products_s": median(bench.outside_s) if bench.outside_s else None}
    )


def _cache_figures(counters: Counters | None) -> dict[str, object]:
    if counters is None:
        return {}
    figures = asdict(counters) | {"hit_ratio": counters.hit_ratio}
    return {f"expert_cache_{name}": value for name, value in figures.items()}


def _speed_figures(name: str, speed: Speed | None) -> dict[str, object]:
    samples = None if speed is None else list(speed.samples)
    return {f"{name}_tokens_per_s": speed and speed.median, f"{name}_tokens_per_s_samples": samples}


def _spread(speed: Speed) -> str:
    least, greatest = min(speed.samples), max(speed.samples)
    return f"{speed.median:.2f} tok/s (least {least:.2f}, greatest {greatest:.2f}, {len(speed.samples)} runs)"


def _rate(tokens_per_s: float | None) -> str:
    return "- tok/s" if tokens_per_s is None else f"{tokens_per_s:.1f} tok/s"
