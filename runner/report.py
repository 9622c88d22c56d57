"""How a report looks: lines for people, an object for programs. Pure."""

import math
from dataclasses import asdict

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
    del figures["memory"]
    return figures | asdict(report.memory)


def perplexity_figures(value: float, *, n_tokens_scored: int, window: int, tokens_per_s: float) -> dict[str, object]:
    """Return a measured perplexity as one flat JSON object; JSON has no infinity, so that is null."""
    return {
        "perplexity": value if math.isfinite(value) else None,
        "n_tokens_scored": n_tokens_scored,
        "window": window,
        "tokens_per_s": tokens_per_s,
    }


def _rate(tokens_per_s: float | None) -> str:
    return "- tok/s" if tokens_per_s is None else f"{tokens_per_s:.1f} tok/s"
