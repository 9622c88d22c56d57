"""Traces of Mixtral-8x7B as plain text, as published logs of expert offloading have them: one line a step and layer.

    3,4

Line i belongs to step i // 32 and layer i % 32; step 0 is the prefill, with all the experts its tokens chose. What
model it was stands nowhere, so it is this one. The order of a line's experts says nothing: they are sorted here.
"""

import re

from runner.traces.errors import TraceInvalid
from runner.traces.record import TraceShape

MIXTRAL_8X7B = TraceShape(n_layers=32, n_experts=8, top_k=2)

_LINE = re.compile(rb"\d(,\d)*")


def parse_plain_line(line: bytes, shape: TraceShape, *, is_prefill: bool) -> tuple[int, ...]:
    """Return the experts of one line, in ascending order; raise TraceInvalid."""
    line = line.strip()
    if not _LINE.fullmatch(line):
        raise TraceInvalid(f"numbers of experts with commas between them are expected, {line!r:.40} came")
    experts = tuple(sorted(int(expert) for expert in line.split(b",")))
    n_max = shape.n_experts if is_prefill else shape.top_k
    if not shape.top_k <= len(experts) <= n_max or len(set(experts)) != len(experts) or experts[-1] >= shape.n_experts:
        raise TraceInvalid(
            f"{shape.top_k} to {n_max} different experts below {shape.n_experts} are expected, {line!r:.40} came"
        )
    return experts
