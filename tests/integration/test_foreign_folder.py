"""Whoever stands in a folder with modules of the same names as ours, or of Python's, runs our code all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.runtime_dir import RuntimeDir
from tests.support.checkpoints import write_checkpoint
from tests.support.daemon import stop_background_daemon

CONFIG = Path(__file__).parents[2] / "configs" / "mixtral-8x7b-fp16.toml"
NAMES = ("json", "click", "queue", "protocol", "quant", "expertd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    for name in NAMES:
        (poisoned / f"{name}.py").write_text("raise SystemExit('a module of the current folder was run')\n")
    return poisoned


def run_in(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run as a console script does: without the current folder on the path."""
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_quantizing_imports_nothing_of_the_current_folder(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")

    done = run_in(
        folder, "-m", "expertd", "quantize", str(checkpoint), str(tmp_path / "store"), "--config", str(CONFIG)
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "manifest.json").is_file()


def test_a_runner_starts_expertd_from_any_folder(folder: Path, store: Path, runtime: RuntimeDir) -> None:
    attach = "import sys; from pathlib import Path; from runner.client import attach; from runner.config import *"
    done = run_in(folder, "-c", f"{attach}\nwith attach(Path(sys.argv[1]), RunnerConfig()): pass", str(store))
    stop_background_daemon(runtime)

    assert done.returncode == 0, done.stderr
