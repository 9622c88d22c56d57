"""JSON from files anybody may have made: bounded, without duplicate keys, one error line. Knows no field."""

import json
from pathlib import Path

from expertd.convert.errors import MalformedCheckpoint


def read_bounded(path: Path, nbytes_max: int) -> bytes:
    """Return a regular file's bytes; raise MalformedCheckpoint if it cannot be read or is longer than that."""
    try:
        if not path.is_file():
            raise MalformedCheckpoint(f"{path}: a regular file is expected")
        with path.open("rb") as file:
            data = file.read(nbytes_max + 1)
    except OSError as error:
        raise MalformedCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > nbytes_max:
        raise MalformedCheckpoint(f"{path}: longer than {nbytes_max} bytes, the most that is expected of such a file")
    return data


def parse_object(data: bytes, name: str) -> dict[str, object]:
    """Return the JSON object in those bytes; raise MalformedCheckpoint saying what `name` is instead."""
    try:
        document = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(f"{name}: not JSON ({error!s:.120})") from None
    if not isinstance(document, dict):
        raise MalformedCheckpoint(f"{name}: a JSON object is expected, {type(document).__name__} came")
    return document


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {duplicate!r:.80} stands twice")
    return document
