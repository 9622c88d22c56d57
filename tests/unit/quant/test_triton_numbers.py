"""The kernels' numbers under Triton's interpreter, which takes a process of its own: here kernels are compiled."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
LIMIT_S = 900


def test_the_kernels_compute_what_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    argv = [sys.executable, "-m", "pytest", "--quiet", "--run-slow", str(FOLDER)]

    run = subprocess.run(argv, cwd=FOLDER.parents[3], capture_output=True, text=True, timeout=LIMIT_S, check=False)

    assert run.returncode == 0, run.stdout + run.stderr
    # All of them, and nothing skipped.
    assert re.fullmatch(r"[1-9]\d+ passed in .*", run.stdout.splitlines()[-1]), run.stdout
