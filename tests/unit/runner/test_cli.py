import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli import run
from runner.report import perplexity_figures


@pytest.fixture(autouse=True)
def _no_user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


GENERATE = ["generate", "--store", "/nonexistent", "--prompt", "hello"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command."),
        (["compute"], "No such command 'compute'."),
        (["generate"], "Missing option '--store'."),
        ([*GENERATE, "--temperature", "nan"], "--temperature: a number from 0 to 100 is expected, nan came"),
        ([*GENERATE, "--top-p", "1.5"], "--top-p: a number from 0 to 1 is expected, 1.5 came"),
        ([*GENERATE, "--device", "link:6"], "--device: device 'link:6': the speed is a number and one of MB/s"),
        ([*GENERATE, "--device", "tpu"], "--device: auto, cpu, cuda, cuda:N or link:SPEED"),
        ([*GENERATE, "--device-memory", "11Gb"], "--device-memory: a number and one of B, kB, MB"),
        ([*GENERATE, "--threads", "0"], "--threads: a whole number from 1 to 1024 is expected, 0 came"),
        ([*GENERATE, "--raw", "--system", "x"], "--system has no place without the chat template"),
        (["perplexity", "--store", "/nonexistent"], "Missing option '--text'."),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(arguments)

    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith(f"runner: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE[:-1], ""], "the prompt is empty"),
        ([*GENERATE, "--device", "cuda:999"], "device cuda:999: "),
        ([*GENERATE[:-1], "\udcff\udcfe"], "--prompt: not UTF-8 (byte 0)"),
        ([*GENERATE[:-1], "é\udcff"], "--prompt: not UTF-8 (byte 2)"),
        ([*GENERATE, "--system", "a\udcff"], "--system: not UTF-8 (byte 1)"),
        (["perplexity", "--store", "/nonexistent", "--text", "/nonexistent/text"], "/nonexistent/text: No such file"),
    ],
)
def test_an_error_is_one_line_and_status_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(arguments)

    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    assert printed.err.startswith(f"runner: {message}")
    assert printed.err.count("\n") == 1


def test_an_impossible_option_in_the_file_is_status_1_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "expertd").mkdir()
    (tmp_path / "expertd" / "runner.toml").write_text("context = -1\n")

    status = run(GENERATE)

    assert status == 1
    assert "runner.toml: context: a whole number" in capsys.readouterr().err


def test_a_text_that_is_no_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_bytes(b"ab\xff")

    status = run(["perplexity", "--store", "/nonexistent", "--text", str(tmp_path / "text")])

    assert status == 1
    assert "not UTF-8 (byte 2)" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(["--version"])

    assert status == 0
    assert capsys.readouterr().out.startswith("runner, version ")


def test_nothing_heavy_is_imported_before_the_command_line_is_right() -> None:
    program = (
        "import sys, runner, runner.cli; runner.cli.run(['generate', '--store', 'x', '--prompt', 'y', '--top-k', '0']);"
        "print(sorted({'torch', 'tokenizers', 'jinja2', 'zmq', 'numpy'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout == b"[]\n"


def test_the_package_offers_the_engine() -> None:
    import runner

    assert runner.open_engine.__module__ == "runner.engine"
    with pytest.raises(AttributeError, match="no attribute 'open_motor'"):
        runner.open_motor  # noqa: B018  # type: ignore[attr-defined]


def test_an_infinite_perplexity_is_null_in_json() -> None:
    figures = perplexity_figures(math.inf, n_tokens_scored=3, window=4, tokens_per_s=5.0)

    assert json.loads(json.dumps(figures, allow_nan=False))["perplexity"] is None


def test_a_finite_perplexity_is_in_json_as_it_is() -> None:
    figures = perplexity_figures(7.5, n_tokens_scored=3, window=4, tokens_per_s=5.0)

    assert figures == {"perplexity": 7.5, "n_tokens_scored": 3, "window": 4, "tokens_per_s": 5.0}


def test_what_stdout_cannot_encode_is_written_as_its_number() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help']; sys.stdout.reconfigure(encoding='iso-8859-1');"
        "import runner.commands as c; c.cli.help = '→'; from runner.cli import main; main()"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert b"\\u2192" in done.stdout
