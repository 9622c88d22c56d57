"""A step in a process of its own: whatever it does, the next one is run."""

import sys
from pathlib import Path
from time import monotonic

import pytest

from benchmarks.gpu.cli import run_all
from benchmarks.gpu.running import CRASHED, FAILED, OK, SKIPPED, TIMED_OUT, Outcome, run_step
from benchmarks.gpu.steps import STEPS, Step
from benchmarks.processes import Environment
from tests.support.waiting import wait_for_exit


def run(program: str, limit_s: float = 30.0) -> Outcome:
    return run_step([sys.executable, "-c", program], limit_s, Environment(Path("/nonexistent")).variables)


def test_a_steps_last_line_is_its_result() -> None:
    outcome = run("print('compiling ...'); print('{\"gb_per_s\": 24.5}')")

    assert (outcome.outcome, outcome.result) == (OK, {"gb_per_s": 24.5})


@pytest.mark.parametrize("printed", ["", "done", "[1, 2]", '{"gb_per_s": '])
def test_a_step_that_prints_no_object_has_failed(printed: str) -> None:
    outcome = run(f"print({printed!r})")

    assert outcome.outcome == FAILED
    assert outcome.reason is not None
    assert "a JSON object is expected as the last line" in outcome.reason


def test_a_step_that_fails_is_reported_with_its_last_line() -> None:
    outcome = run("import sys; print('trace', file=sys.stderr); sys.exit('ValueError: no such expert')")

    assert (outcome.outcome, outcome.reason) == (FAILED, "ValueError: no such expert")


def test_a_step_that_is_killed_is_reported_with_its_signal() -> None:
    outcome = run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")

    assert (outcome.outcome, outcome.reason) == (CRASHED, "signal SIGSEGV: nothing was said")


def test_a_step_that_ends_without_a_word_has_crashed() -> None:
    assert run("import os; os._exit(3)").reason == "exit status 3: nothing was said"


def test_a_step_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    hang = f"""if True:
        import subprocess, sys, threading
        child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        open({str(started)!r}, "w").write(str(child.pid))
        threading.Event().wait()
    """
    began_s = monotonic()

    outcome = run(hang, limit_s=3.0)

    assert (outcome.outcome, outcome.reason) == (TIMED_OUT, "after 3 s")
    assert monotonic() - began_s < 13
    wait_for_exit(int(started.read_text()))


def test_the_outcome_in_the_report_has_no_empty_fields() -> None:
    assert Outcome(SKIPPED, reason="no time").as_json() == {"outcome": SKIPPED, "took_s": 0.0, "reason": "no time"}
    assert Outcome(OK, 1.234, {"a": 1}).as_json() == {"outcome": OK, "took_s": 1.23, "result": {"a": 1}}


def test_without_a_gpu_every_step_that_needs_one_says_so_and_the_others_are_run(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: its steps would run for minutes")
    steps = tuple(step for step in STEPS if step.name in ("environment", "costs", "ablation"))

    outcomes = run_all(steps, tmp_path, Environment(tmp_path / "run").variables, trace=None, total_s=100)

    assert list(outcomes) == ["environment", "costs", "ablation"]
    for name in ("environment", "costs"):
        assert outcomes[name].outcome == FAILED
        assert "CUDA" in (outcomes[name].reason or "")
    assert outcomes["ablation"].result == {"left_out": "no trace to route by: --trace names one"}


def test_steps_behind_the_time_for_all_are_skipped(tmp_path: Path) -> None:
    outcomes = run_all(
        (Step("costs", "costs", 30),), tmp_path, Environment(tmp_path / "run").variables, trace=None, total_s=0
    )

    assert outcomes["costs"] == Outcome(SKIPPED, reason="the time for all steps was over")


def test_every_step_is_a_function_of_its_module() -> None:
    assert all(callable(step.load()) for step in STEPS)
