"""Traces as JSON lines: the first says what model it was, every further one is a token.

    {"format": "expertd-routing", "version": 1, "n_layers": 32, "n_experts": 8, "top_k": 2}
    {"phase": "decode", "expert_ids": [[3, 4], ...], "probabilities": [[0.61, 0.39], ...]}

`expert_ids` has one list a layer, in the gate's order: top_k long, in a prefill perhaps longer. `probabilities`, shaped
alike, may be left out. A file may come from anybody: each line is bounded before it is parsed and checked behind it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TextIO

from protocol.json_object import parse_json_object
from runner.traces.errors import TraceInvalid
from runner.traces.record import DECODE, PREFILL, Phase, TokenRouting, TraceShape

FORMAT = "expertd-routing"
VERSION = 1

_COUNT_MAX = 4096  # layers and experts; far beyond any model's
_DIGITS = 6  # what an fp32 holds, about


class TraceWriter:
    """Writes a trace into an open text file, token by token: one that is cut short between tokens is whole."""

    def __init__(self, file: TextIO, shape: TraceShape) -> None:
        self._file = file
        self._put({"format": FORMAT, "version": VERSION} | asdict(shape))

    def write(self, token: TokenRouting) -> None:
        """Append one token."""
        line: dict[str, object] = {"phase": token.phase, "expert_ids": token.expert_ids}
        if token.probabilities is not None:
            line["probabilities"] = [[round(p, _DIGITS) for p in layer] for layer in token.probabilities]
        self._put(line)

    def _put(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")


def parse_header(line: bytes) -> TraceShape:
    """Return what the first line says of the model; raise TraceInvalid."""
    header = _object(line, {"format", "version", "n_layers", "n_experts", "top_k"}, optional=set())
    if header["format"] != FORMAT or header["version"] != VERSION or isinstance(header["version"], bool):
        raise TraceInvalid(
            f"format {FORMAT!r} version {VERSION} is expected, {header['format']!r:.40} {header['version']!r:.40} came"
        )
    n_layers = _whole("n_layers", header["n_layers"], 1, _COUNT_MAX)
    n_experts = _whole("n_experts", header["n_experts"], 1, _COUNT_MAX)
    return TraceShape(n_layers, n_experts, _whole("top_k", header["top_k"], 1, n_experts))


def parse_token(line: bytes, shape: TraceShape) -> TokenRouting:
    """Return one token of a model of that shape; raise TraceInvalid."""
    token = _object(line, {"phase", "expert_ids"}, optional={"probabilities"})
    phase = _phase(token["phase"])
    layers = _lists("expert_ids", token["expert_ids"], shape.n_layers)
    n_chosen_max = shape.n_experts if phase == PREFILL else shape.top_k
    expert_ids = tuple(
        _experts(f"expert_ids of layer {layer}", experts, shape, n_chosen_max) for layer, experts in enumerate(layers)
    )
    if "probabilities" not in token:
        return TokenRouting(phase, expert_ids)
    given = _lists("probabilities", token["probabilities"], shape.n_layers)
    probabilities = tuple(
        _probabilities(f"probabilities of layer {layer}", numbers, len(expert_ids[layer]))
        for layer, numbers in enumerate(given)
    )
    return TokenRouting(phase, expert_ids, probabilities)


def _phase(value: object) -> Phase:
    if value == PREFILL:
        return PREFILL
    if value == DECODE:
        return DECODE
    raise TraceInvalid(f"phase: {PREFILL!r} or {DECODE!r} is expected, {value!r:.40} came")


def _object(line: bytes, required: set[str], *, optional: set[str]) -> dict[str, object]:
    try:
        document = parse_json_object(line)
    except ValueError as error:
        raise TraceInvalid(str(error)) from None
    missing, unknown = required - document.keys(), document.keys() - required - optional
    if missing:
        raise TraceInvalid(f"{_listed(missing)} missing")
    if unknown:
        raise TraceInvalid(f"{_listed(unknown)} unknown")
    return document


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"{key!r:.40}" for key in sorted(keys)[:5])


def _lists(name: str, value: object, n_layers: int) -> Iterator[list[object]]:
    if not isinstance(value, list) or len(value) != n_layers or not all(isinstance(part, list) for part in value):
        raise TraceInvalid(f"{name}: {n_layers} lists are expected, one a layer, {value!r:.40} came")
    return iter(value)


def _experts(name: str, experts: list[object], shape: TraceShape, n_max: int) -> tuple[int, ...]:
    ids = tuple(_whole(name, expert, 0, shape.n_experts - 1) for expert in experts)
    if not shape.top_k <= len(ids) <= n_max or len(set(ids)) != len(ids):
        raise TraceInvalid(f"{name}: {shape.top_k} to {n_max} different experts are expected, {experts!r:.60} came")
    return ids


def _probabilities(name: str, numbers: list[object], n_experts: int) -> tuple[float, ...]:
    probabilities = tuple(number for number in numbers if isinstance(number, float | int) and 0 <= number <= 1)
    if len(probabilities) != len(numbers) or len(numbers) != n_experts:
        raise TraceInvalid(f"{name}: {n_experts} numbers from 0 to 1 are expected, {numbers!r:.60} came")
    return probabilities


def _whole(name: str, value: object, least: int, greatest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= greatest:
        raise TraceInvalid(f"{name}: a whole number from {least} to {greatest} is expected, {value!r:.40} came")
    return value
