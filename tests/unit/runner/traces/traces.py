"""Small traces for tests."""

import random

from runner.traces.record import DECODE, PREFILL, TokenRouting, Trace, TraceShape


def trace_of_layer(*decoded: tuple[int, ...], prefill: tuple[int, ...] = (), n_experts: int = 8) -> Trace:
    """Return a trace of one layer; a token chooses as many experts as the first one does."""
    tokens = [TokenRouting(DECODE, (experts,)) for experts in decoded]
    if prefill:
        tokens.insert(0, TokenRouting(PREFILL, (prefill,)))
    return Trace(TraceShape(1, n_experts, len(decoded[0])), tuple(tokens))


def random_trace(n_tokens: int, *, n_layers: int = 3, n_experts: int = 8, top_k: int = 2, seed: int = 0) -> Trace:
    """Return a trace in which chance alone chooses, without a prefill."""
    generator = random.Random(seed)
    tokens = (
        TokenRouting(DECODE, tuple(tuple(generator.sample(range(n_experts), top_k)) for _ in range(n_layers)))
        for _ in range(n_tokens)
    )
    return Trace(TraceShape(n_layers, n_experts, top_k), tuple(tokens))
