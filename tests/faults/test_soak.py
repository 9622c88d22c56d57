"""The soak itself, for some seconds: that it runs, kills, compares, and says when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.report import Report

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_soak_of_half_a_minute_is_clean(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.soak",
        "--minutes",
        "0.5",
        "--seed",
        "5",
        "--json",
        str(tmp_path / "soak.json"),
    ]

    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    report = json.loads((tmp_path / "soak.json").read_text())
    assert result.returncode == 0, result.stdout
    assert report["is_clean"]
    assert report["n_texts"] > 100
    assert report["events"]["runner killed"] > 3
    assert "texts that differ from an undisturbed run's | 0 |" in result.stdout


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_texts", 0), ("n_wrong_texts", 1), ("complaints", {"runner: no": 1}), ("left", ["session of 5"])],
)
def test_a_report_with_anything_wrong_is_not_clean(field: str, value: object) -> None:
    report = Report({}, seed=1, minutes=1.0, memory=None, n_texts=5)
    was_clean = report.is_clean

    setattr(report, field, value)

    assert was_clean
    assert not report.is_clean
    assert not json.loads(report.as_json())["is_clean"]
