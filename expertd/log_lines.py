"""What a line of the log looks like, for people and for programs. Pure, but for the process's own number.

Every line is an event: words, then key=%placeholder pairs, as the template of a logging call has them. The words are
the event's code and the pairs its fields, so that both forms come from one call:

    logger.warning("bad message session=%d pid=%d", 3, 77)
    2026-11-25 17:00:00,123 level=WARNING logger=expertd.service bad message session=3 pid=77
    {"ts": "2026-11-25T17:00:00.123Z", "level": "warning", "event": "bad_message", "session": 3, "pid": 77, ...}
"""

import json
import logging
import os
import re
from datetime import UTC, datetime
from functools import lru_cache

_FIELD = re.compile(r" (\w+)=(%(?:\.\d+)?[sdgfr])")
_EVENT = re.compile(r"[a-z][a-z ,']*")
_TEXT_FORMAT = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
# Line breaks and the rest of what a terminal obeys: a peer's words must not write lines of their own.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


@lru_cache(maxsize=512)  # templates stand in the source: there are only so many
def parsed(template: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the event's code and its fields' names; None for a template that is not in this form."""
    names = tuple(found[1] for found in _FIELD.finditer(template))
    words = _FIELD.sub("", template)
    return (re.sub(r"[^a-z]+", "_", words), names) if _EVENT.fullmatch(words) else None


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of a record by name; empty for one in another form."""
    found = parsed(str(record.msg))
    if found is None or not isinstance(record.args, tuple) or len(found[1]) != len(record.args):
        return {}
    return dict(zip(found[1], record.args, strict=True))


class TextLines(logging.Formatter):
    """A line for people. A traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, in one piece whatever it holds."""
        n_suppressed = getattr(record, "n_suppressed", 0)
        line = super().formatMessage(record).translate(_CONTROL)
        return f"{line} suppressed={n_suppressed}" if n_suppressed else line


class JsonLines(logging.Formatter):
    """One JSON object a line. `daemon` is this process; `pid` and `uid`, where there are, those of a peer."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        found = parsed(str(record.msg))
        fields = fields_of(record)
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": found[0] if found else "message",
            "daemon": os.getpid(),
            "logger": record.name,
        }
        if found is None or len(fields) != len(found[1]):
            line["message"] = record.getMessage()
        line |= {name: _plain(value) for name, value in fields.items()}
        if n_suppressed := getattr(record, "n_suppressed", 0):
            line["suppressed"] = n_suppressed
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | bool) else str(value)
