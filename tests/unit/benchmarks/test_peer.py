import sys
from pathlib import Path

import pytest

from benchmarks.errors import CommandFailed, NothingToMeasure
from benchmarks.peer import LlamaBench, Speed, SpeedPlan, find_llama_bench, measure_perplexity, read_speed

# As llama-bench, as far as we use it: repacked it decodes faster and prefills slower, and it keeps what it was asked.
FAKE = """\
#!{python}
import json, sys
arguments = sys.argv[1:]
if arguments == ["--help"]:
    print("usage: llama-bench {help}")
    sys.exit()
with open({log!r}, "a") as log:
    print(" ".join(arguments), file=log)
is_repacked = "--repack 1" in " ".join(arguments)
is_prefill = arguments[arguments.index("-n") + 1] == "0"
speed = 100 if is_prefill else 10
speed += (-20 if is_prefill else 2) * is_repacked
print(json.dumps([{{"samples_ts": [speed - 1, speed, speed + 5]}}]))
"""


def fake_llama_bench(folder: Path, help_text: str = "--repack <0|1>") -> Path:
    program = folder / "llama-bench"
    program.write_text(FAKE.format(python=sys.executable, help=help_text, log=str(folder / "log")))
    program.chmod(0o755)
    return program


def test_both_ways_of_packing_are_measured_and_each_figure_takes_the_faster(tmp_path: Path) -> None:
    fastest = LlamaBench(fake_llama_bench(tmp_path)).fastest(tmp_path / "model.gguf", SpeedPlan())

    assert fastest == Speed(prefill=100.0, decode=12.0)


def test_a_build_that_cannot_repack_is_measured_as_it_is(tmp_path: Path) -> None:
    speeds = LlamaBench(fake_llama_bench(tmp_path, help_text="")).speeds(tmp_path / "model.gguf", SpeedPlan())

    assert speeds == (Speed(prefill=100.0, decode=10.0),)
    assert "--repack" not in (tmp_path / "log").read_text()


def test_it_is_asked_for_prefill_into_nothing_and_decode_behind_the_context(tmp_path: Path) -> None:
    plan = SpeedPlan(prompt_tokens=64, context_tokens=256, decode_tokens=8, runs=2, threads=3)

    LlamaBench(fake_llama_bench(tmp_path, help_text="")).speeds(Path("m.gguf"), plan)

    common = "-m m.gguf -t 3 -r 2 -o json"
    expected = [f"{common} -p 64 -n 0", f"{common} -p 0 -n 8 -d 256"]
    assert (tmp_path / "log").read_text().splitlines() == expected


@pytest.mark.parametrize("output", ["", "[]", '[{"avg_ts": 1}]', '[{"samples_ts": []}]', "{"])
def test_an_answer_that_is_none_is_an_error_and_no_figure(output: str) -> None:
    with pytest.raises(CommandFailed, match="one test with samples_ts was expected"):
        read_speed(output)


def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho 'no such model' >&2\nexit 3\n")
    program.chmod(0o755)

    with pytest.raises(CommandFailed, match="ended with 3: no such model"):
        LlamaBench(program)


def test_a_path_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasure, match="no program"):
        find_llama_bench(tmp_path / "missing")


def test_without_a_path_the_program_on_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_bench(None) is None

    program = fake_llama_bench(tmp_path)

    assert find_llama_bench(None) == program


def test_perplexity_is_read_from_what_the_program_beside_says(tmp_path: Path) -> None:
    program = tmp_path / "llama-perplexity"
    program.write_text("#!/bin/sh\necho 'Final estimate: PPL = 22.8449 +/- 2.28958' >&2\n")
    program.chmod(0o755)

    value = measure_perplexity(tmp_path / "llama-bench", Path("m.gguf"), Path("text"), n_chunks=4, window=512)

    assert value == 22.8449


def test_perplexity_is_left_out_where_the_program_is_not(tmp_path: Path) -> None:
    assert measure_perplexity(tmp_path / "llama-bench", Path("m"), Path("t"), n_chunks=4, window=512) is None
