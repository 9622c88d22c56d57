"""Both formats of traces: what was written is read, and what is no trace is refused by line, whoever made it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.traces.errors import TraceInvalid
from runner.traces.json_lines import TraceWriter, parse_header, parse_token
from runner.traces.reader import read_trace
from runner.traces.record import DECODE, PREFILL, TokenRouting, Trace, TraceShape

SHAPE = TraceShape(n_layers=2, n_experts=4, top_k=2)
HEADER = {"format": "expertd-routing", "version": 1, "n_layers": 2, "n_experts": 4, "top_k": 2}
TOKEN = {"phase": "decode", "expert_ids": [[3, 1], [0, 2]], "probabilities": [[0.75, 0.25], [0.5, 0.5]]}
PLAIN_STEP = "0,1\n" * 32


def write(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_trace_that_was_written_is_read_back(tmp_path: Path) -> None:
    tokens = (
        TokenRouting(PREFILL, ((0, 3, 1), (1, 2)), None),
        TokenRouting(DECODE, ((3, 1), (0, 2)), ((0.75, 0.25), (0.625, 0.375))),
    )
    with (tmp_path / "trace").open("w") as file:
        writer = TraceWriter(file, SHAPE)
        for token in tokens:
            writer.write(token)

    trace = read_trace(tmp_path / "trace")

    assert trace == Trace(SHAPE, tokens)


def test_probabilities_are_written_to_six_digits(tmp_path: Path) -> None:
    with (tmp_path / "trace").open("w") as file:
        TraceWriter(file, SHAPE).write(TokenRouting(DECODE, ((3, 1), (0, 2)), ((2 / 3, 1 / 3), (1.0, 0.0))))

    (token,) = read_trace(tmp_path / "trace").tokens

    assert token.probabilities == ((0.666667, 0.333333), (1.0, 0.0))


def test_a_trace_without_tokens_is_one(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, HEADER))

    assert trace == Trace(SHAPE, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "routes"}, "format 'expertd-routing' version 1 is expected, 'routes' 1 came"),
        ({"version": 2}, "'expertd-routing' 2 came"),
        ({"version": True}, "'expertd-routing' True came"),
        ({"n_layers": 0}, "n_layers: a whole number from 1 to 4096 is expected, 0 came"),
        ({"n_layers": 1e3}, "n_layers: a whole number from 1 to 4096 is expected, 1000.0 came"),
        ({"n_experts": 10**9}, "n_experts: a whole number from 1 to 4096 is expected, 1000000000 came"),
        ({"top_k": 5}, "top_k: a whole number from 1 to 4 is expected, 5 came"),
        ({"model": "x"}, "'model' unknown"),
    ],
)
def test_a_first_line_that_is_none_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, HEADER | change)

    with pytest.raises(TraceInvalid, match="line 1: ") as refused:
        read_trace(path)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "encode"}, "phase: 'prefill' or 'decode' is expected, 'encode' came"),
        ({"phase": ["decode"]}, "phase: 'prefill' or 'decode' is expected"),
        ({"expert_ids": 3}, "expert_ids: 2 lists are expected, one a layer, 3 came"),
        ({"expert_ids": [[3, 1]]}, "expert_ids: 2 lists are expected, one a layer, [[3, 1]] came"),
        ({"expert_ids": [[3, 1], 2]}, "expert_ids: 2 lists are expected"),
        ({"expert_ids": [[3, 1], [0, 4]]}, "expert_ids of layer 1: a whole number from 0 to 3 is expected, 4 came"),
        (
            {"expert_ids": [[3, 1], [0, True]]},
            "expert_ids of layer 1: a whole number from 0 to 3 is expected, True came",
        ),
        ({"expert_ids": [[3, 3], [0, 2]]}, "expert_ids of layer 0: 2 to 2 different experts are expected, [3, 3] came"),
        ({"expert_ids": [[3], [0, 2]]}, "2 to 2 different experts are expected, [3] came"),
        ({"expert_ids": [[3, 1, 2], [0, 2]]}, "2 to 2 different experts are expected, [3, 1, 2] came"),
        ({"phase": "prefill", "expert_ids": [[3], [0, 2]]}, "2 to 4 different experts are expected, [3] came"),
        ({"probabilities": [[0.5, 0.5]]}, "probabilities: 2 lists are expected"),
        ({"probabilities": [[0.5], [0.5, 0.5]]}, "probabilities of layer 0: 2 numbers from 0 to 1 are expected"),
        ({"probabilities": [[0.5, 1.5], [0.5, 0.5]]}, "2 numbers from 0 to 1 are expected, [0.5, 1.5] came"),
        ({"probabilities": [[0.5, float("nan")], [0.5, 0.5]]}, "2 numbers from 0 to 1 are expected"),
        ({"probabilities": [[0.5, "1"], [0.5, 0.5]]}, "2 numbers from 0 to 1 are expected"),
        ({"position": 3}, "'position' unknown"),
    ],
)
def test_a_token_that_is_none_is_refused_by_its_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, HEADER, TOKEN, TOKEN | change, TOKEN)

    with pytest.raises(TraceInvalid, match=r"trace\.jsonl: line 3: ") as refused:
        read_trace(path)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "line 0: a trace starts with a brace or a digit, b'' came"),
        (("hello",), "line 1: a trace starts with a brace or a digit"),
        ((HEADER, "[1]"), "line 2: a JSON object is expected, list came"),
        ((HEADER, '{"phase": "decode"'), "line 2: not JSON"),
        ((HEADER, '{"phase": "decode", "phase": "decode"}'), "line 2: not JSON (key 'phase' stands twice)"),
        ((HEADER, {"phase": "decode"}), "line 2: 'expert_ids' missing"),
        ((HEADER, "[" * 100_000), "line 2: not JSON"),
        ((HEADER, "x" * (1 << 20)), "line 2: more than 1048576 bytes"),
        (("0,1",), "line 1: the last step ends behind 1 of 32 layers"),
        ((PLAIN_STEP + "0,1,2",), "line 33: 2 to 2 different experts below 8 are expected, b'0,1,2' came"),
        (("0,8",), "line 1: 2 to 8 different experts below 8 are expected, b'0,8' came"),
        (("0,0",), "line 1: 2 to 8 different experts below 8 are expected, b'0,0' came"),
        (("0",), "line 1: 2 to 8 different experts below 8 are expected, b'0' came"),
        (("0,1", "0;1"), "line 2: numbers of experts with commas between them are expected, b'0;1' came"),
        (("0,1", ""), "line 2: numbers of experts with commas between them are expected, b'' came"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_one_line(
    lines: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, *lines)

    with pytest.raises(TraceInvalid) as refused:
        read_trace(path)

    assert str(refused.value).startswith(f"{path}: {message}")
    assert len(str(refused.value)) < len(str(path)) + 250


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match=r"nothing: No such file or directory"):
        read_trace(tmp_path / "nothing")


def test_a_file_longer_than_any_trace_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: zeros without a newline

    with pytest.raises(TraceInvalid, match="line 2: more than 1048576 bytes"):
        read_trace(path)


def test_plain_text_is_a_prefill_and_steps_of_mixtral_in_ascending_order(tmp_path: Path) -> None:
    path = write(tmp_path, "7,0,2\n" + "0,1\n" * 31 + "6,3\n" + "1,0\n" * 31 + "5,4\n" + "0,1\n" * 30 + "0,1")

    trace = read_trace(path)

    assert trace.shape == TraceShape(n_layers=32, n_experts=8, top_k=2)
    assert [token.phase for token in trace.tokens] == [PREFILL, DECODE, DECODE]
    assert [token.expert_ids[0] for token in trace.tokens] == [(0, 2, 7), (3, 6), (4, 5)]
    assert {token.probabilities for token in trace.tokens} == {None}


def test_a_layers_steps_take_a_prefill_together() -> None:
    tokens = [(PREFILL, (3, 1)), (PREFILL, (1, 2)), (DECODE, (2, 0)), (PREFILL, (3, 0)), (DECODE, (1, 3))]
    trace = Trace(SHAPE, tuple(TokenRouting(phase, ((0, 1), chosen)) for phase, chosen in tokens))

    steps = list(trace.steps(1))

    assert steps == [(PREFILL, (1, 2, 3)), (DECODE, (2, 0)), (PREFILL, (0, 3)), (DECODE, (1, 3))]


@given(line=st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789.eE-phasedcoxrtiblmfNIu ', max_size=200))
def test_bytes_of_any_kind_are_refused_and_raise_nothing_else(line: bytes | str) -> None:
    data = line.encode() if isinstance(line, str) else line

    for parse in (parse_header, lambda data: parse_token(data, SHAPE)):
        with pytest.raises(TraceInvalid):
            parse(data)
