"""JSON from files anybody may have made: bounded, without duplicate keys, one error line. Knows no field."""

from pathlib import Path

from expertd.convert.errors import MalformedCheckpoint
from protocol.json_object import parse_json_object


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
        return parse_json_object(data)
    except ValueError as error:
        raise MalformedCheckpoint(f"{name}: {error}") from None
