"""Experts that have a scheme of their own: which, and how many bits. Knows no files and no tensors.

    [[override]]
    layers = "0-3"        # of these layers; of all if left out
    experts = "1,5"       # these experts; all if left out
    nbits = 4             # 16, 8, 4, 3 or 2: that width's scheme

Where several hold for an expert, the last one counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from expertd.convert.errors import ConfigError
from expertd.convert.words import SIXTEEN_BIT, nearest
from protocol.handles import ExpertKey

OVERRIDES_MAX: Final = 1024

_SCHEMES = {16: SIXTEEN_BIT, 8: "8bit-g64", 4: "4bit-g64", 3: "3bit-g64", 2: "2bit-g16"}
_SPAN = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?\Z")
_SPANS_NBYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Override:
    """One override, as it stands in the file; raise ConfigError for what cannot be meant whatever the model."""

    nbits: int
    layers: str | None = None
    experts: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.nbits, int) or isinstance(self.nbits, bool) or self.nbits not in _SCHEMES:
            raise ConfigError(f"nbits: one of {', '.join(map(str, _SCHEMES))} is expected, {self.nbits!r:.60} came")
        if self.layers is None and self.experts is None:
            raise ConfigError("layers, experts or both are expected; the option 'experts' outside is for all of them")
        for option, text in (("layers", self.layers), ("experts", self.experts)):
            if text is not None:
                _read_spans(option, text)

    @property
    def scheme(self) -> str:
        """The scheme of the experts it is for, in the words of a configuration."""
        return _SCHEMES[self.nbits]

    def holds_for(self, key: ExpertKey) -> bool:
        """Whether that expert is one of those."""
        return _is_in(key.layer, "layers", self.layers) and _is_in(key.expert, "experts", self.experts)

    def check(self, n_layers: int, n_experts: int) -> None:
        """Raise ConfigError where it names a layer or an expert that the model has not."""
        for option, text, count in (("layers", self.layers, n_layers), ("experts", self.experts, n_experts)):
            greatest = -1 if text is None else max(span.stop - 1 for span in _read_spans(option, text))
            if greatest >= count:
                raise ConfigError(f"{option}: {greatest} came, this model has {option} 0 to {count - 1}")


def read_overrides(tables: object) -> tuple[Override, ...]:
    """Return the overrides in a document's tables, or those that are ready already; raise ConfigError."""
    if not isinstance(tables, list | tuple):
        raise ConfigError("override: tables [[override]] are expected")
    if len(tables) > OVERRIDES_MAX:
        raise ConfigError(f"override: at most {OVERRIDES_MAX} tables are expected, {len(tables)} came")
    return tuple(_read_override(number, table) for number, table in enumerate(tables, start=1))


def check_overrides(overrides: tuple[Override, ...], n_layers: int, n_experts: int) -> None:
    """Raise ConfigError where one of them names a layer or an expert that the model has not."""
    for number, override in enumerate(overrides, start=1):
        try:
            override.check(n_layers, n_experts)
        except ConfigError as error:
            raise ConfigError(f"override {number}: {error}") from None


def _read_override(number: int, table: object) -> Override:
    if isinstance(table, Override):
        return table
    if not isinstance(table, Mapping):
        raise ConfigError(f"override {number}: a table is expected, {table!r:.60} came")
    known = [field.name for field in fields(Override)]
    for option in table:
        if option not in known:
            raise ConfigError(f"override {number}: {nearest(option, known)}")
    if "nbits" not in table:
        raise ConfigError(f"override {number}: nbits is missing")
    try:
        return Override(**table)
    except ConfigError as error:
        raise ConfigError(f"override {number}: {error}") from None


def _is_in(number: int, option: str, text: str | None) -> bool:
    return text is None or any(number in span for span in _read_spans(option, text))


def _read_spans(option: str, text: object) -> list[range]:
    """Return the numbers in a text like 0-3,7; raise ConfigError."""
    if not isinstance(text, str) or len(text) > _SPANS_NBYTES_MAX:
        raise ConfigError(f'{option}: a text like "0-3,7" is expected, {text!r:.60} came')
    spans = []
    for word in text.split(","):
        match = _SPAN.match(word.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(
                f'{option}: numbers and spans from low to high like "0-3,7" are expected, {text!r:.60} came'
            )
        spans.append(range(first, last + 1))
    return spans
