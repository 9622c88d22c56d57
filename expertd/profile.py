"""Which experts a model chooses most, from a routing trace that `runner trace` wrote. Reads one file, bounded."""

import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from expertd.errors import ProfileInvalid
from protocol.handles import ExpertKey
from protocol.json_object import parse_json_object

_FORMAT = ("expertd-routing", 1)
_FILE_NBYTES_MAX = 1 << 30
_LINE_NBYTES_MAX = 1 << 20


def most_chosen(path: Path, n_max: int) -> tuple[ExpertKey, ...]:
    """Return the experts that the trace's tokens chose most often, most often first; raise ProfileInvalid."""
    counts: Counter[ExpertKey] = Counter()
    lines = _lines(path)
    _check_header(path, next(lines, b"{}"))
    for number, line in enumerate(lines, start=2):
        counts.update(_chosen(f"{path}: line {number}", line))
    return tuple(sorted(counts, key=lambda key: (-counts[key], key))[:n_max])


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _FILE_NBYTES_MAX:
            raise ProfileInvalid(f"{path}: a regular file of at most {_FILE_NBYTES_MAX >> 30} GiB was expected")
        with path.open("rb") as file:
            while line := file.readline(_LINE_NBYTES_MAX + 1):
                if len(line) > _LINE_NBYTES_MAX:
                    raise ProfileInvalid(f"{path}: a line is longer than {_LINE_NBYTES_MAX} bytes")
                yield line
    except OSError as error:
        raise ProfileInvalid(f"{path}: cannot be read ({error.strerror})") from None


def _check_header(path: Path, line: bytes) -> None:
    header = _object(str(path), line)
    if (header.get("format"), header.get("version")) != _FORMAT:
        raise ProfileInvalid(f"{path}: a routing trace of `runner trace` was expected")


def _chosen(name: str, line: bytes) -> Iterator[ExpertKey]:
    """Yield every choice of a token."""
    layers = _object(name, line).get("expert_ids")
    if not isinstance(layers, list) or not all(isinstance(experts, list) for experts in layers):
        raise ProfileInvalid(f"{name}: expert_ids: lists of experts were expected")
    for layer, experts in enumerate(layers):
        for expert in experts:
            if type(expert) is not int or not 0 <= expert < 1 << 16:
                raise ProfileInvalid(f"{name}: expert_ids: numbers of experts were expected, {expert!r:.40} came")
            yield ExpertKey(layer, expert)


def _object(name: str, line: bytes) -> dict[str, object]:
    try:
        return parse_json_object(line)
    except ValueError as error:
        raise ProfileInvalid(f"{name}: {error}") from None
