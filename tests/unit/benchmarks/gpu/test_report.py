import getpass
import json
import platform
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu.cli import main, own_names
from benchmarks.gpu.report import report_of, without_names
from benchmarks.gpu.running import CRASHED, OK, Outcome


def test_a_report_holds_the_machine_and_every_steps_outcome() -> None:
    outcomes = {"copies": Outcome(OK, 2.0, {"gb_per_s": [1.5, 2.5]}), "kernels": Outcome(CRASHED, 1.0, reason="signal")}

    report = report_of({"cpu": "a fast one"}, outcomes, [])

    assert json.loads(json.dumps(report)) == {
        "format": 1,
        "machine": {"cpu": "a fast one"},
        "steps": {
            "copies": {"outcome": "ok", "took_s": 2.0, "result": {"gb_per_s": [1.5, 2.5]}},
            "kernels": {"outcome": "crashed", "took_s": 1.0, "reason": "signal"},
        },
    }


def test_names_of_hosts_users_and_folders_are_taken_out_wherever_they_stand() -> None:
    value = {"a": ["/home/alice/store: missing", "on Tower.local"], "b": {"c": "by alice, tower"}, "d": 1.5}

    cleared = without_names(value, ["/home/alice", "alice", "tower", "tower.local", ""])

    assert cleared == {"a": ["(name)/store: missing", "on (name)"], "b": {"c": "by (name), (name)"}, "d": 1.5}


def test_a_name_inside_a_word_stays_and_so_do_keys() -> None:
    assert without_names({"gpu": "gpus, gpu-memory, gpu."}, ["gpu"]) == {"gpu": "gpus, gpu-memory, (name)."}


def test_this_machines_names_are_known() -> None:
    names = own_names()

    assert platform.node() in names
    assert getpass.getuser() in names
    assert str(Path.home()) in names


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "report.json"

    done = CliRunner().invoke(main, ["--out", str(out)])

    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpu: torch ")
    assert done.stderr.count("\n") == 1
    assert not out.exists()
