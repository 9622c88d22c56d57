import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import cli as module
from benchmarks.cli import cli
from benchmarks.errors import NothingToMeasure
from benchmarks.figures import Figure
from benchmarks.processes import Environment
from benchmarks.settings import Settings
from quant.errors import StaleLibrary


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and no llama-bench."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path / "cache"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What every measurement is told, in place of being done."""
    told: list[Settings] = []

    def measure(_: Environment, settings: Settings) -> list[Figure]:
        told.append(settings)
        return [Figure("a thing", "ms", (1.5,) * settings.rounds)]

    for benchmarks in (module.BENCHMARKS, module.ON_REQUEST):
        for name in benchmarks:
            monkeypatch.setitem(benchmarks, name, measure)
    return told


def test_the_figures_are_a_table_and_json_with_machine_and_command(tmp_path: Path, seen: list[Settings]) -> None:
    result = CliRunner().invoke(cli, ["layers", "--rounds", "2", "--out", str(tmp_path / "out.json")])

    document = json.loads((tmp_path / "out.json").read_text())
    assert result.exit_code == 0, result.output
    assert "| a thing | 1.5 | 1.5 | 1.5 | ms | 2 |" in result.stdout
    assert document["figures"]["layers"][0]["samples"] == [1.5, 1.5]
    assert document["machine"]["n_cpus"] >= 1
    assert document["command"].startswith("python -m benchmarks")
    assert len(seen) == 1


def test_without_names_all_is_measured_that_there_is_something_for(seen: list[Settings]) -> None:
    result = CliRunner().invoke(cli, [])

    assert result.exit_code == 0, result.output
    assert "demo is left out: there is no demo store" in result.stderr
    assert "layers is measured without llama.cpp" in result.stderr
    assert [line for line in result.stderr.splitlines() if line.endswith("…")] == [
        "bandwidth …", "kernels …", "layers …", "requests …", "slots …",
    ]  # fmt: skip
    assert len(seen) == 5


def test_the_demo_s_store_is_found(own_cache: Path, seen: list[Settings]) -> None:
    store = own_cache / "expertd" / "demo" / "store-1234"
    store.mkdir(parents=True)
    (store / "manifest.json").touch()

    CliRunner().invoke(cli, ["several", "full", "--scheme", "2bit-g16"])

    assert [settings.store for settings in seen] == [store, store]
    assert seen[0].schemes == ("2bit-g16",)
    assert seen[0].folder == own_cache / "expertd" / "bench"


def test_a_measurement_without_its_store_is_one_line() -> None:
    result = CliRunner().invoke(cli, ["store"])

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "benchmarks: store: a store with a tokenizer is needed"


def test_what_fails_costs_nothing_that_others_measured(seen: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Environment, settings: Settings) -> list[Figure]:
        raise NothingToMeasure(f"nothing in {settings.folder.name}")

    monkeypatch.setitem(module.BENCHMARKS, "kernels", fail)

    result = CliRunner().invoke(cli, ["bandwidth", "kernels", "layers"])

    assert result.exit_code == 1
    assert "benchmarks: nothing in bench" in result.stderr
    assert result.stdout.count("| a thing |") == len(seen) == 2


def test_a_place_for_the_json_that_is_none_is_refused_before_measuring(tmp_path: Path, seen: list[Settings]) -> None:
    result = CliRunner().invoke(cli, ["layers", "--out", str(tmp_path / "missing" / "out.json")])

    assert result.exit_code == 2
    assert "missing is no folder" in result.stderr
    assert seen == []


def test_an_unknown_measurement_is_refused_with_those_that_there_are() -> None:
    result = CliRunner().invoke(cli, ["kernel"])

    assert result.exit_code == 2
    assert "'kernels'" in result.stderr


def test_a_library_of_another_version_is_told_before_anything_is_measured(
    seen: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe() -> None:
        raise StaleLibrary("libexpertd_kernels.so: version 6, this code needs 7; install the package again")

    monkeypatch.setattr(module, "describe_machine", describe)

    result = CliRunner().invoke(cli, ["layers"])

    assert (result.exit_code, seen) == (1, [])
    assert result.stderr == (
        "benchmarks: libexpertd_kernels.so: version 6, this code needs 7; install the package again\n"
    )
