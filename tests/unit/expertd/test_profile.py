"""Which experts stay in memory, from what a model chose: a file of anybody's making."""

from pathlib import Path

import pytest

from expertd.errors import ProfileInvalid
from expertd.profile import most_chosen
from protocol.handles import ExpertKey
from runner.traces.json_lines import TraceWriter
from runner.traces.record import DECODE, PREFILL, TokenRouting, TraceShape

HEADER = '{"format":"expertd-routing","version":1,"n_layers":2,"n_experts":8,"top_k":2}\n'


def test_a_trace_that_the_runner_wrote_gives_the_most_chosen_experts_first(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with path.open("w") as file:
        writer = TraceWriter(file, TraceShape(2, 8, 2))
        writer.write(TokenRouting(PREFILL, ((0, 1), (2, 3))))
        writer.write(TokenRouting(DECODE, ((1, 4), (3, 5)), ((0.6, 0.4), (0.7, 0.3))))
        writer.write(TokenRouting(DECODE, ((1, 0), (3, 2))))

    keys = most_chosen(path, 4)

    assert keys == (ExpertKey(0, 1), ExpertKey(1, 3), ExpertKey(0, 0), ExpertKey(1, 2))


def test_a_trace_without_tokens_pins_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(HEADER)

    assert most_chosen(path, 4) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a routing trace of `runner trace` was expected"),
        ("[]\n", "a JSON object is expected"),
        ('{"format":"expertd-routing","version":2}\n', "a routing trace"),
        (HEADER + "{}\n", "line 2: expert_ids: lists of experts"),
        (HEADER + '{"expert_ids":[3]}\n', "line 2: expert_ids: lists of experts"),
        (HEADER + '{"expert_ids":[["a"]]}\n', "line 2: expert_ids: numbers of experts were expected, 'a' came"),
        (HEADER + '{"expert_ids":[[true]]}\n', "line 2: expert_ids: numbers of experts"),
        (HEADER + '{"expert_ids":[[65536]]}\n', "line 2: expert_ids: numbers of experts"),
        (HEADER + "x" * (1 << 20) + "y\n", "a line is longer than"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)

    with pytest.raises(ProfileInvalid, match=message):
        most_chosen(path, 4)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match="cannot be read"):
        most_chosen(tmp_path / "none", 4)
    with pytest.raises(ProfileInvalid, match="a regular file"):
        most_chosen(tmp_path, 4)
