"""The command line of `replay` and `trace`, as far as it needs no store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli import run
from runner.traces.json_lines import TraceWriter
from tests.unit.runner.traces.traces import random_trace


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace = random_trace(30)
    with (tmp_path / "trace.jsonl").open("w") as file:
        writer = TraceWriter(file, trace.shape)
        for token in trace.tokens:
            writer.write(token)
    return tmp_path / "trace.jsonl"


TRACE = ["trace", "--store", "/nonexistent"]


def test_replay_prints_a_row_for_each_size_and_a_column_for_each_policy(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["replay", str(trace_file)])

    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0] == "30 decode tokens · 3 layers · 8 experts, 2 a token"
    assert lines[4].split() == ["k", "lru", "lfu", "random", "belady", "uniform"]
    assert [line.split()[0] for line in lines[5:]] == ["2", "3", "4", "5", "6", "7"]


def test_replay_takes_the_policies_and_sizes_it_is_told_and_prints_json(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ["--policy", "belady", "--policy", "lru", "--cache-experts", "8", "--cache-experts", "2"]

    status = run(["replay", str(trace_file), "--json", *choice])

    figures = json.loads(capsys.readouterr().out)
    assert status == 0
    assert list(figures["hit_ratios"]) == ["belady", "lru"]
    assert figures["cache_experts"] == [8, 2]
    assert figures["hit_ratios"]["lru"][0] > figures["hit_ratios"]["lru"][1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["replay"], 2, "Missing argument 'TRACE'."),
        (["replay", "/nonexistent", "--policy", "fifo"], 2, "Invalid value for '--policy': 'fifo' is not one of"),
        (["replay", "/nonexistent"], 1, "/nonexistent: No such file or directory"),
        (["replay", "/dev/null"], 1, "/dev/null: line 0: a trace starts with a brace or a digit, b'' came"),
        (TRACE, 2, "exactly one of --text and --prompt is expected"),
        ([*TRACE, "--prompt", "x", "--text", "y"], 2, "exactly one of --text and --prompt is expected"),
        ([*TRACE, "--prompt", "x", "--tokens", "3", "--window", "4"], 2, "--tokens, --window: without a meaning for"),
        ([*TRACE, "--text", "x", "--raw"], 2, "--raw: without a meaning for --text"),
        ([*TRACE, "--text", "x", "--max-new-tokens", "3"], 2, "--max-new-tokens: without a meaning for --text"),
        ([*TRACE, "--text", "/nonexistent"], 1, "/nonexistent: No such file or directory"),
        ([*TRACE, "--prompt", ""], 1, "the prompt is empty"),
        ([*TRACE, "--prompt", "\udcff"], 1, "--prompt: not UTF-8 (byte 0)"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    came = run(arguments)

    printed = capsys.readouterr()
    assert (came, printed.out) == (status, "")
    assert printed.err.startswith(f"runner: {message}")
    assert printed.err.count("\n") == 1


def test_more_slots_than_experts_are_refused(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["replay", str(trace_file), "--cache-experts", "9"])

    assert status == 1
    assert (
        "--cache-experts: 2 (a token's experts) to 8 (all of a layer's) are expected, 9 came" in capsys.readouterr().err
    )


def test_without_matplotlib_a_plot_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)

    status = run([*TRACE, "--prompt", "x", "--plot", "figure.png"])

    assert status == 1
    assert "pip install 'expertd[plot]'" in capsys.readouterr().err


def test_replaying_imports_nothing_heavy(trace_file: Path) -> None:
    program = (
        f"import sys, runner.cli; runner.cli.run(['replay', {str(trace_file)!r}]);"
        "print(sorted({'torch', 'tokenizers', 'numpy', 'matplotlib', 'zmq'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout.splitlines()[-1] == b"[]"
