"""The report: what every step became, and nothing that says whose machine it was. Knows no step."""

import re
from collections.abc import Iterable, Mapping

from benchmarks.gpu.running import Outcome

FORMAT = 1


def report_of(
    machine: Mapping[str, object], outcomes: Mapping[str, Outcome], names: Iterable[str]
) -> dict[str, object]:
    """Return the report as one JSON object, from which those names of hosts, users and folders are taken out."""
    report = {
        "format": FORMAT,
        "machine": dict(machine),
        "steps": {step: outcome.as_json() for step, outcome in outcomes.items()},
    }
    cleared = without_names(report, names)
    if not isinstance(cleared, dict):
        raise TypeError("a report is an object")
    return cleared


def without_names(value: object, names: Iterable[str]) -> object:
    """Return the JSON value with each of the names replaced in its texts, where it stands as a word; keys stay."""
    words = sorted({name for name in names if name}, key=len, reverse=True)
    if not words:
        return value
    pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in words), re.IGNORECASE)
    return _replaced(value, pattern)


def _replaced(value: object, pattern: re.Pattern[str]) -> object:
    if isinstance(value, str):
        return pattern.sub("(name)", value)
    if isinstance(value, Mapping):
        return {key: _replaced(part, pattern) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(part, pattern) for part in value]
    return value
