"""The daemon's settings come from one file whose every mistake is named."""

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from expertd.config import DaemonConfig, StoreConfig, load_config, my_runtime_dir
from expertd.errors import ConfigError

MANUAL = Path(__file__).parents[3] / "configs" / "expertd.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "expertd.toml"
    path.write_text(text)
    return path


def test_the_manual_holds_every_setting_with_its_default() -> None:
    values = tomllib.loads(MANUAL.read_text())

    assert values == asdict(DaemonConfig())


def test_the_manual_can_be_used_as_it_is() -> None:
    config = load_config(MANUAL)

    assert config == DaemonConfig()


def test_without_a_file_the_defaults_hold() -> None:
    config = load_config(None)

    assert config == DaemonConfig()


def test_the_users_own_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "expertd").mkdir()
    (tmp_path / "expertd" / "expertd.toml").write_text("idle_timeout_s = 7\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    config = load_config(None)

    assert config.idle_timeout_s == 7.0


def test_a_file_overrides_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "loader_threads = 3\n"))

    assert config == DaemonConfig(loader_threads=3)
    assert config.n_loader_threads == 3


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path, "idle_timeout = 7\n")

    with pytest.raises(ConfigError, match=r"unknown key 'idle_timeout'; did you mean 'idle_timeout_s'\?"):
        load_config(path)


@pytest.mark.parametrize(
    "line",
    [
        'idle_timeout_s = "7"',
        "idle_timeout_s = -1",
        "idle_timeout_s = nan",
        "idle_timeout_s = inf",
        "idle_timeout_s = true",
        "collapse_budget_s = -0.5",
        "loader_threads = 1.5",
        "loader_threads = 257",
        "loader_threads = true",
        'log_level = "loud"',
        "log_level = 3",
        'log_format = "xml"',
        "log_nbytes_max = 99999",
        "log_nbytes_max = true",
        'metrics = "on"',
        'metrics = "9464"',
        "metrics = 9464",
        'metrics = "0.0.0.0:9464"',
        'metrics = "192.168.1.2:9464"',
        'metrics = "[::]:9464"',
        'metrics = "localhost:9464"',
        'metrics = "127.0.0.1:0"',
        'metrics = "127.0.0.1:65536"',
    ],
)
def test_a_wrong_value_is_refused_with_file_key_and_what_was_expected(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, line)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    key = line.split(" ", maxsplit=1)[0]
    assert str(caught.value).startswith(f"{path}: {key}: ")
    assert "was expected" in str(caught.value)


@pytest.mark.parametrize("content", [b"idle_timeout_s = ", b"\xff\xfe"])
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "expertd.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="not TOML"):
        load_config(path)


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


def test_the_runtime_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_RUNTIME_DIR", str(tmp_path))

    directory = my_runtime_dir()

    assert directory.control_socket == tmp_path / "control.sock"


@pytest.mark.parametrize(
    ("text", "address"),
    [("off", None), ("unix", None), ("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::1]:9464", ("::1", 9464))],
)
def test_metrics_have_an_address_on_the_loopback_or_none(
    tmp_path: Path, text: str, address: tuple[str, int] | None
) -> None:
    config = load_config(write(tmp_path, f'metrics = "{text}"\n'))

    assert config.metrics == text
    assert config.metrics_address == address


def test_what_is_set_for_a_store_is_found_by_any_path_to_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to("store")
    text = f'[stores."{tmp_path}/link"]\nmemory = "1.5GiB"\npin = "trace.jsonl"\n'

    config = load_config(write(tmp_path, text))

    expected = StoreConfig(3 << 29, tmp_path / "trace.jsonl")
    assert config.of_store(tmp_path / "store") == config.of_store(tmp_path / "link") == expected
    assert config.of_store(tmp_path / "another") == StoreConfig()


def test_a_speed_limit_is_read(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'read_limit = "1.5GB/s"\n'))

    assert config.read_limit_nbytes_per_s == 1_500_000_000
    assert DaemonConfig().read_limit_nbytes_per_s is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read_limit = 5", "read_limit: a speed like '1.5GB/s' or '' was expected, 5 came"),
        ('read_limit = "5GB"', "read_limit: a speed"),
        ('read_limit = "0GB/s"', "read_limit: a speed"),
        ("reader_threads = 0", "reader_threads: a whole number from 1 to 256"),
        ("stores = 5", "stores: a table for each store was expected"),
        ("[stores]\nx = 5", 'stores."x": a table was expected'),
        ('[stores.x]\nmemory = "much"', r'stores\."x": memory: a number and one of'),
        ("[stores.x]\nmemory = 5", r'stores\."x": memory: a number and one of'),
        ("[stores.x]\npin = 5", r'stores\."x": pin: the path of a profile'),
        ('[stores.x]\nmemroy = "5GB"', "unknown key 'memroy'; did you mean 'memory'"),
    ],
)
def test_a_mistake_in_what_concerns_stores_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text + "\n")

    with pytest.raises(ConfigError, match=message):
        load_config(path)
