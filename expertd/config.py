"""The daemon's settings: flag over file over default. The one place of the package that reads the environment."""

import ipaddress
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

from expertd.errors import ConfigError
from expertd.systemd import MANAGER_VARIABLES, ManagerEnvironment, manager_environment
from protocol.quantities import nbytes_of, what_a_size_is
from protocol.runtime_dir import RuntimeDir, runtime_dir


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What is set for one store: the bytes it may take, None: what there is; and a profile of what stays in memory."""

    memory_nbytes: int | None = None
    pin: Path | None = None


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What configs/expertd.toml explains."""

    idle_timeout_s: float = 0.0
    loader_threads: int = 0
    collapse_budget_s: float = 30.0
    reader_threads: int = 8
    read_limit: str = ""
    stores: dict[Path, StoreConfig] = field(default_factory=dict)
    log_level: str = "info"
    log_format: str = "text"
    log_nbytes_max: int = 16_000_000
    metrics: str = "off"

    @property
    def n_loader_threads(self) -> int:
        """The threads that read a store: as configured, else what the processors allow."""
        return self.loader_threads or min(8, 2 * len(os.sched_getaffinity(0)))

    @property
    def read_limit_nbytes_per_s(self) -> int | None:
        """How fast experts are read at most; None: as fast as the disk can."""
        return nbytes_of(self.read_limit.removesuffix("/s"))

    def of_store(self, path: Path) -> StoreConfig:
        """Return what is set for the store in that directory."""
        return self.stores.get(Path(os.path.realpath(path)), StoreConfig())

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Where on the loopback metrics are served; None: nowhere, or at a socket."""
        return _loopback_address(self.metrics)


_LOG_LEVELS = ("debug", "info", "warning", "error")
_LOG_FORMATS = ("text", "json")
_LOG_NBYTES_LEAST = 100_000


def my_runtime_dir() -> RuntimeDir:
    """Return where this user's daemon is met."""
    return runtime_dir(os.environ, os.geteuid())


def fault_point() -> str | None:
    """Return the fault that a test wants of this process; see protocol.fault_points."""
    return os.environ.get("EXPERTD_FAULT_POINT")


def config_file() -> Path:
    """Return where a user's own settings are read from."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "expertd" / "expertd.toml"


def take_manager_environment() -> ManagerEnvironment:
    """Return what a service manager told this process, and take it out of the environment: children are not meant."""
    said = manager_environment(os.environ, os.getpid())
    for name in MANAGER_VARIABLES:
        os.environ.pop(name, None)
    return said


def load_config(path: Path | None) -> DaemonConfig:
    """Return the settings in that file, or in the user's own if it is None and exists; raise ConfigError."""
    if path is None:
        path = config_file()
        if not path.exists():
            return DaemonConfig()
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from None
    return _checked(path, values)


def _checked(path: Path, values: dict[str, object]) -> DaemonConfig:
    _check_keys(path, values, [item.name for item in fields(DaemonConfig)])
    return DaemonConfig(
        idle_timeout_s=_seconds(path, values, "idle_timeout_s"),
        loader_threads=_count(path, values, "loader_threads"),
        collapse_budget_s=_seconds(path, values, "collapse_budget_s"),
        reader_threads=_count(path, values, "reader_threads", least=1),
        read_limit=_read_limit(path, values),
        stores=_stores(path, values),
        log_level=_word(path, values, "log_level", _LOG_LEVELS),
        log_format=_word(path, values, "log_format", _LOG_FORMATS),
        log_nbytes_max=_log_nbytes_max(path, values),
        metrics=_metrics(path, values),
    )


def _check_keys(path: Path, values: dict[str, object], known: list[str]) -> None:
    for key in values:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: unknown key {key!r}; did you mean {nearest!r}?")


def _seconds(path: Path, values: dict[str, object], key: str) -> float:
    value = values.get(key, getattr(DaemonConfig(), key))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise ConfigError(f"{path}: {key}: a number of seconds, at least 0, was expected, {value!r} came")
    return float(value)


def _count(path: Path, values: dict[str, object], key: str, least: int = 0) -> int:
    value = values.get(key, getattr(DaemonConfig(), key))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 256:
        raise ConfigError(f"{path}: {key}: a whole number from {least} to 256 was expected, {value!r} came")
    return value


def _read_limit(path: Path, values: dict[str, object]) -> str:
    text = values.get("read_limit", "")
    is_speed = isinstance(text, str) and text.endswith("/s") and bool(nbytes_of(text.removesuffix("/s")))
    if text != "" and not is_speed:
        raise ConfigError(f"{path}: read_limit: a speed like '1.5GB/s' or '' was expected, {text!r:.40} came")
    return str(text)


def _stores(path: Path, values: dict[str, object]) -> dict[Path, StoreConfig]:
    tables = values.get("stores", {})
    if not isinstance(tables, dict):
        raise ConfigError(f'{path}: stores: a table for each store was expected, as in [stores."/path/to/store"]')
    return {Path(os.path.realpath(name)): _store(path, f'stores."{name}"', table) for name, table in tables.items()}


def _store(path: Path, name: str, values: object) -> StoreConfig:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {name}: a table was expected, {values!r:.40} came")
    _check_keys(path, values, ["memory", "pin"])
    memory, pin = values.get("memory"), values.get("pin")
    nbytes = nbytes_of(memory) if isinstance(memory, str) else None
    if memory is not None and not nbytes:
        raise ConfigError(f"{path}: {name}: memory: {what_a_size_is()}, {memory!r:.40} came")
    if pin is not None and not isinstance(pin, str):
        raise ConfigError(f"{path}: {name}: pin: the path of a profile was expected, {pin!r:.40} came")
    return StoreConfig(nbytes, path.parent / pin if pin else None)


def _word(path: Path, values: dict[str, object], key: str, words: Sequence[str]) -> str:
    value = values.get(key, getattr(DaemonConfig(), key))
    if value not in words:
        raise ConfigError(f"{path}: {key}: one of {', '.join(words)} was expected, {value!r} came")
    return str(value)


def _log_nbytes_max(path: Path, values: dict[str, object]) -> int:
    value = values.get("log_nbytes_max", DaemonConfig().log_nbytes_max)
    if isinstance(value, bool) or not isinstance(value, int) or not (value == 0 or value >= _LOG_NBYTES_LEAST):
        expected = f"a number of bytes, 0 or at least {_LOG_NBYTES_LEAST}, was expected"
        raise ConfigError(f"{path}: log_nbytes_max: {expected}, {value!r} came")
    return value


def _metrics(path: Path, values: dict[str, object]) -> str:
    value = values.get("metrics", DaemonConfig().metrics)
    if isinstance(value, str) and (value in ("off", "unix") or _loopback_address(value) is not None):
        return value
    expected = '"off", "unix", or a loopback address and port like "127.0.0.1:9464" was expected'
    raise ConfigError(f"{path}: metrics: {expected}, {value!r} came")


def _loopback_address(text: str) -> tuple[str, int] | None:
    """Return host and port; None for what is no address, or one that others on the network could reach."""
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]") if host.startswith("[") else host)
    except ValueError:
        return None
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
    return (str(address), int(port)) if is_port and address.is_loopback else None
