import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.tools.fake_commands import FakeCommands, fake_commands
from tools.demo.cache import Recipe
from tools.demo.cli import run
from tools.demo.commands import shown
from tools.demo.errors import StepFailed
from tools.demo.show import daemon_state, show

PROMPT = "Why is the sky blue?"
REPOSITORY = Path(__file__).parents[3]
LIMIT_S = 60


@pytest.fixture
def fakes(tmp_path: Path) -> FakeCommands:
    state = tmp_path / "state"
    state.mkdir()
    return fake_commands(state)


def run_demo(fakes: FakeCommands, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    argv = fakes.run_demo_argv(tmp_path / "cache")
    return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_the_demo_generates_twice_and_stops_the_daemon_it_started(fakes: FakeCommands, tmp_path: Path) -> None:
    show(fakes.commands, tmp_path / "store", PROMPT)

    assert fakes.calls() == [
        "expertd status",
        "expertd start",
        "runner generate",
        "runner generate",
        "expertd status",
        "expertd status",
        "expertd stop",
    ]
    assert not fakes.is_running


def test_a_daemon_that_ran_before_runs_on(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.start_daemon()

    show(fakes.commands, tmp_path / "store", PROMPT)

    assert fakes.is_running
    assert "expertd start" not in fakes.calls()
    assert "expertd stop" not in fakes.calls()


def test_a_daemon_that_ran_before_gives_back_the_memory_of_the_demo(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.start_daemon()

    show(fakes.commands, tmp_path / "store", PROMPT)

    assert fakes.held_store == ""


def test_a_daemon_that_held_the_store_before_holds_it_still(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.start_daemon(tmp_path / "store")

    show(fakes.commands, tmp_path / "store", PROMPT)

    assert fakes.held_store == str(tmp_path / "store")


def test_a_daemon_that_ran_before_runs_on_after_a_failure(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.start_daemon()
    fakes.replace("runner", "exit 3")

    with pytest.raises(StepFailed):
        show(fakes.commands, tmp_path / "store", PROMPT)

    assert fakes.is_running


def test_a_failed_step_stops_the_daemon_and_ends_with_its_exit_code(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.replace("runner", "echo 'runner: no such store' >&2; exit 3")

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 3
    assert "runner: no such store\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert fakes.calls()[-1] == "expertd stop"
    assert not fakes.is_running


def test_a_failed_start_that_left_a_daemon_stops_it(fakes: FakeCommands, tmp_path: Path) -> None:
    expertd = (fakes.state / "expertd").read_text()
    fakes.replace("expertd", expertd.replace("start | load)", 'start) touch "$state/running"; exit 4 ;;\n load)'))

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 4
    assert not fakes.is_running


def test_a_failed_start_without_a_daemon_stops_nothing(fakes: FakeCommands, tmp_path: Path) -> None:
    expertd = (fakes.state / "expertd").read_text()
    fakes.replace("expertd", expertd.replace("start | load)", "start) exit 4 ;;\n load)"))

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 4
    assert "expertd stop" not in fakes.calls()


def test_ctrl_c_stops_the_daemon(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.replace("runner", "kill -INT $PPID; exit 130")

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert fakes.calls()[-1] == "expertd stop"
    assert not fakes.is_running


def test_sigterm_ends_the_running_command_and_stops_the_daemon(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.replace("runner", 'kill -TERM $PPID; read -r _ < "$state/never"')
    os.mkfifo(fakes.state / "never")

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 128 + 15
    assert "Traceback" not in done.stderr
    assert not fakes.is_running


@pytest.mark.parametrize("signal_name", ["INT", "TERM", "HUP"])
def test_a_second_signal_does_not_keep_the_daemon_from_being_stopped(
    fakes: FakeCommands, tmp_path: Path, signal_name: str
) -> None:
    fakes.replace("runner", "kill -INT $PPID; exit 130")
    expertd = (fakes.state / "expertd").read_text()
    fakes.replace("expertd", expertd.replace("stop)", f"stop) kill -{signal_name} $PPID; kill -{signal_name} $$;"))

    done = run_demo(fakes, tmp_path)

    assert done.returncode == 130
    assert not fakes.is_running


def test_a_status_that_says_nothing_of_a_daemon_is_a_failure(fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.replace("expertd", "echo 'expertd: the runtime directory is not yours' >&2; exit 1")

    with pytest.raises(StepFailed, match="status --json: ended with exit code 1"):
        daemon_state(fakes.commands, tmp_path)


def test_commands_are_printed_before_their_output(
    fakes: FakeCommands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    show(fakes.commands, tmp_path / "store", PROMPT)

    said = capfd.readouterr().out
    assert said.index(f"generate --store {tmp_path}/store --prompt '{PROMPT}'") < said.index("text\n")


def test_a_program_below_the_working_folder_is_shown_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    typed = shown([str(tmp_path / ".venv/bin/runner"), "generate", "--prompt", "a b"])

    assert typed == ".venv/bin/runner generate --prompt 'a b'"


def test_a_missing_configuration_is_one_line_and_exit_code_1(
    fakes: FakeCommands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(root=tmp_path, config=tmp_path / "demo.toml", gguf=None)

    exit_code = run(recipe, tmp_path / "cache", fakes.commands, PROMPT, keep_checkpoint=False)

    assert exit_code == 1
    assert capfd.readouterr().err == f"demo: {tmp_path}/demo.toml: cannot be read (No such file or directory)\n"
