"""The daemon's settings: flag over file over default. The one place of the package that reads the environment."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from expertd.errors import ConfigError
from expertd.systemd import MANAGER_VARIABLES, ManagerEnvironment, manager_environment
from protocol.runtime_dir import RuntimeDir, runtime_dir


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What configs/expertd.toml explains."""

    idle_timeout_s: float = 0.0
    loader_threads: int = 0
    collapse_budget_s: float = 30.0
    log_level: str = "info"
    log_format: str = "text"
    log_nbytes_max: int = 16_000_000

    @property
    def n_loader_threads(self) -> int:
        """The threads that read a store: as configured, else what the processors allow."""
        return self.loader_threads or min(8, 2 * len(os.sched_getaffinity(0)))


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
    known = [field.name for field in fields(DaemonConfig)]
    for key in values:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: unknown key {key!r}; did you mean {nearest!r}?")
    return DaemonConfig(
        idle_timeout_s=_seconds(path, values, "idle_timeout_s"),
        loader_threads=_count(path, values, "loader_threads"),
        collapse_budget_s=_seconds(path, values, "collapse_budget_s"),
        log_level=_word(path, values, "log_level", _LOG_LEVELS),
        log_format=_word(path, values, "log_format", _LOG_FORMATS),
        log_nbytes_max=_log_nbytes_max(path, values),
    )


def _seconds(path: Path, values: dict[str, object], key: str) -> float:
    value = values.get(key, getattr(DaemonConfig(), key))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise ConfigError(f"{path}: {key}: a number of seconds, at least 0, was expected, {value!r} came")
    return float(value)


def _count(path: Path, values: dict[str, object], key: str) -> int:
    value = values.get(key, getattr(DaemonConfig(), key))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 256:
        raise ConfigError(f"{path}: {key}: a whole number from 0 to 256 was expected, {value!r} came")
    return value


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
