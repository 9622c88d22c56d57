"""One logging call, two forms; and every call of the daemon is in the form that both are made from."""

import ast
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from expertd.log_lines import JsonLines, TextLines, parsed

EXPERTD = Path(__file__).parents[3] / "expertd"
TEMPLATE = "bad message session=%d pid=%d detail=%s"


def record(template: str, *arguments: object, n_suppressed: int = 0) -> logging.LogRecord:
    made = logging.LogRecord("expertd.service", logging.WARNING, "", 0, template, arguments, None)
    made.created = 1700000000.5
    made.n_suppressed = n_suppressed
    return made


def as_json(made: logging.LogRecord) -> dict[str, object]:
    line = JsonLines().format(made)
    assert "\n" not in line
    document = json.loads(line)
    assert isinstance(document, dict)
    return document


def templates(path: Path) -> list[str]:
    """Return the templates of all logging calls in a file; fails for one that is not written there."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    logged = [
        call.args[0]
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "logger"
    ]
    return [node.value if isinstance(node, ast.Constant) else ast.unparse(node) for node in logged]  # type: ignore[misc]


def test_every_line_of_the_daemon_is_an_event_with_its_fields() -> None:
    found = [(path.name, template) for path in EXPERTD.glob("*.py") for template in templates(path)]

    wrong = [(name, template) for name, template in found if parsed(template) is None]

    assert len(found) > 10
    assert wrong == []


def test_a_program_reads_the_event_and_its_fields_with_their_types() -> None:
    document = as_json(record(TEMPLATE, 3, 77, "cut"))

    assert document == {
        "ts": "2023-11-14T22:13:20.500Z",
        "level": "warning",
        "event": "bad_message",
        "daemon": os.getpid(),
        "logger": "expertd.service",
        "session": 3,
        "pid": 77,
        "detail": "cut",
    }


def test_a_person_reads_words_and_pairs() -> None:
    line = TextLines().format(record(TEMPLATE, 3, 77, "cut"))

    assert line.endswith(" level=WARNING logger=expertd.service bad message session=3 pid=77 detail=cut")


def test_what_was_suppressed_is_said_in_both_forms() -> None:
    made = record(TEMPLATE, 3, 77, "cut", n_suppressed=12)

    assert TextLines().format(made).endswith(" suppressed=12")
    assert as_json(made)["suppressed"] == 12


@pytest.mark.parametrize("lines", [TextLines(), JsonLines()])
def test_a_peers_words_write_no_line_of_their_own(lines: logging.Formatter) -> None:
    line = lines.format(record(TEMPLATE, 3, 77, "x\n2026 level=INFO all is well\r\x1b[2J\x7f"))

    assert not set(line) & {"\n", "\r", "\x1b"}


def test_a_traceback_is_part_of_the_object() -> None:
    made = record("it failed digest=%s", "ab")
    try:
        int("the story")
    except ValueError:
        made.exc_info = sys.exc_info()

    document = as_json(made)

    assert document["event"] == "it_failed"
    assert "ValueError: invalid literal for int() with base 10: 'the story'" in str(document["exception"])


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [("%s is odd", ("this",), "this is odd"), ("100% sure", (), "100% sure"), ("a plain Word", (), "a plain Word")],
)
def test_a_line_of_another_form_is_a_message(template: str, arguments: tuple[str, ...], message: str) -> None:
    document = as_json(record(template, *arguments))

    assert (document["event"], document["message"]) == ("message", message)


def test_a_value_that_json_does_not_know_is_written_as_text() -> None:
    document = as_json(record("it failed error=%s path=%s", OSError(2, "gone"), Path("/x")))

    assert document["error"] == "[Errno 2] gone"
    assert document["path"] == "/x"
