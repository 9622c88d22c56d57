"""A JSON object from bytes anybody may have made: without duplicate keys, which readers resolve differently."""

import json


def parse_json_object(data: bytes) -> dict[str, object]:
    """Return the JSON object in those bytes; raise ValueError saying what they are instead."""
    try:
        document = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error!s:.120})") from None
    if not isinstance(document, dict):
        # A ValueError like the others: the caller turns it into its own error, naming the file.
        raise ValueError(f"a JSON object is expected, {type(document).__name__} came")  # noqa: TRY004
    return document


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document: dict[str, object] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"key {key!r:.80} stands twice")
        document[key] = value
    return document
