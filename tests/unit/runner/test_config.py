import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from runner.config import RunnerConfig, load_config, read_config, with_options
from runner.errors import ConfigInvalid

CONFIG_FILE = Path(__file__).parents[3] / "configs" / "runner.toml"


def write_user_config(folder: Path, text: str) -> dict[str, str]:
    path = folder / "expertd" / "runner.toml"
    path.parent.mkdir()
    path.write_text(text)
    return {"XDG_CONFIG_HOME": str(folder)}


def test_the_documented_file_states_every_default() -> None:
    set_in_file = tomllib.loads(CONFIG_FILE.read_text())
    in_comments = re.findall(r"^# (\w+) = ", CONFIG_FILE.read_text(), re.MULTILINE)

    defaults = {field.name: getattr(RunnerConfig(), field.name) for field in fields(RunnerConfig)}

    assert set_in_file == {name: value for name, value in defaults.items() if value is not None}
    assert sorted(in_comments) == sorted(name for name, value in defaults.items() if value is None)


def test_the_documented_file_is_read_as_the_defaults() -> None:
    assert read_config(CONFIG_FILE) == RunnerConfig()


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_config({"XDG_CONFIG_HOME": str(tmp_path)}) == RunnerConfig()


def test_the_file_goes_before_the_default(tmp_path: Path) -> None:
    environment = write_user_config(tmp_path, "context = 128\n")

    assert load_config(environment).context == 128


def test_without_an_xdg_directory_the_home_is_searched(tmp_path: Path) -> None:
    write_user_config(tmp_path, "context = 128\n")
    (tmp_path / "expertd").rename(tmp_path / "moved")
    (tmp_path / ".config").mkdir()
    (tmp_path / "moved").rename(tmp_path / ".config" / "expertd")

    assert load_config({"HOME": str(tmp_path)}).context == 128


def test_an_option_given_goes_before_the_file(tmp_path: Path) -> None:
    environment = write_user_config(tmp_path, "context = 128\nseed = 3\n")

    config = with_options(load_config(environment), {"context": 64})

    assert (config.context, config.seed) == (64, 3)


def test_the_environment_forbids_the_autostart(tmp_path: Path) -> None:
    environment = write_user_config(tmp_path, "autostart = true\n") | {"EXPERTD_AUTOSTART": "0"}

    assert not load_config(environment).autostart


def test_an_unknown_option_is_answered_with_the_nearest_known_one(tmp_path: Path) -> None:
    environment = write_user_config(tmp_path, "temprature = 0.5\n")

    with pytest.raises(ConfigInvalid, match=r"runner\.toml: unknown option 'temprature'; .* 'temperature'"):
        load_config(environment)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "tpu"),
        ("device", 1),
        ("device", "link:fast"),
        ("threads", 0),
        ("threads", True),
        ("context", 0),
        ("context", "4096"),
        ("exact", 1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", False),
        ("top_k", 0),
        ("top_p", 1.5),
        ("top_p", float("inf")),
        ("seed", -1),
        ("prefill_chunk", 0),
        ("max_new_tokens", 0),
        ("cache_experts", 0),
        ("device_memory", 0),
        ("device_memory", "11 giga"),
        ("prefetch_depth", -1),
        ("prefetch_depth", 11),
        ("prefetch_experts", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigInvalid, match=f"^{name}: .*(came$|not 'fast'$)"):
        with_options(RunnerConfig(), {name: value})


@pytest.mark.parametrize("content", [b"context = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "runner.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigInvalid, match=r"runner\.toml: not TOML") as raised:
        read_config(path)

    assert "\n" not in str(raised.value)


def test_a_directory_in_the_files_place_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("11GiB", 11 << 30), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("0.25MiB", 1 << 18), ("7 kB", 7000), ("3B", 3)],
)
def test_memory_is_given_as_people_write_it(text: str, nbytes: int) -> None:
    assert with_options(RunnerConfig(), {"device_memory": text}).device_memory == nbytes


def test_one_way_to_size_the_cache_replaces_the_other_one_of_the_file() -> None:
    config = with_options(RunnerConfig(), {"device_memory": "11GiB"})

    config = with_options(config, {"cache_experts": 4})

    assert (config.cache_experts, config.device_memory) == (4, None)


def test_both_ways_to_size_the_cache_at_once_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"^cache_experts: not together with device_memory"):
        with_options(RunnerConfig(), {"device_memory": "11GiB", "cache_experts": 4})
