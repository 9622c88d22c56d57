"""The runner's options: flag before file before default. The only place of the runner that reads the environment.

Knows neither click nor torch. `configs/runner.toml` documents every option.
"""

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from protocol.runtime_dir import RuntimeDir, runtime_dir
from runner.devices import check_device
from runner.errors import ConfigInvalid, DeviceUnavailable
from runner.quantities import parse_nbytes

# How records reach a GPU: through page-locked chunks, or out of the store's own memory, page-locked at the start.
PIN_STAGED = "staged"
PIN_DIRECT = "direct"

GUESSED_MAX = 16
DEPTH_MAX = 10

_CONFIG_NBYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What may be chosen for a run; None means that the option is not set."""

    device: str = "auto"
    threads: int | None = None
    context: int = 4096
    exact: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    autostart: bool = True
    prefill_chunk: int = 512
    cache_experts: int | None = None
    device_memory: int | None = None  # bytes
    prefetch_depth: int = 1
    prefetch_experts: int = 2
    pin: str = PIN_STAGED

    def __post_init__(self) -> None:
        """Raise ConfigInvalid for a value outside its range."""
        _check_device(self.device)
        _check_whole("threads", self.threads, 1, 1024, optional=True)
        _check_whole("context", self.context, 1, 1 << 24)
        _check_bool("exact", self.exact)
        _check_whole("max_new_tokens", self.max_new_tokens, 1, 1 << 24)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_whole("top_k", self.top_k, 1, 1 << 24, optional=True)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_whole("seed", self.seed, 0, (1 << 63) - 1, optional=True)
        _check_bool("autostart", self.autostart)
        _check_whole("prefill_chunk", self.prefill_chunk, 1, 1 << 15)
        _check_whole("cache_experts", self.cache_experts, 1, 4096, optional=True)
        _check_whole("device_memory", self.device_memory, 1, 1 << 50, optional=True)
        _check_whole("prefetch_depth", self.prefetch_depth, 0, DEPTH_MAX)
        _check_whole("prefetch_experts", self.prefetch_experts, 1, GUESSED_MAX)
        if self.pin not in (PIN_STAGED, PIN_DIRECT):
            raise ConfigInvalid(f"pin: one of {PIN_STAGED}, {PIN_DIRECT} is expected, {self.pin!r:.80} came")
        if self.cache_experts is not None and self.device_memory is not None:
            raise ConfigInvalid(
                "cache_experts: not together with device_memory: either says how many experts the device holds"
            )


def load_config(environment: Mapping[str, str] | None = None) -> RunnerConfig:
    """Return the options of the user's file, if there is one, and of the environment; raise ConfigInvalid."""
    environment = os.environ if environment is None else environment
    path = config_path(environment)
    config = read_config(path) if path.exists() else RunnerConfig()
    if environment.get("EXPERTD_AUTOSTART") == "0":
        config = replace(config, autostart=False)
    return config


def config_path(environment: Mapping[str, str]) -> Path:
    """Return where the user's file is looked for."""
    base = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "/")) / ".config")
    return Path(base) / "expertd" / "runner.toml"


def read_config(path: Path) -> RunnerConfig:
    """Return the options in that file; raise ConfigInvalid naming the file and the option."""
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_NBYTES_MAX + 1)
    except OSError as error:
        raise ConfigInvalid(f"{path}: {error.strerror}") from None
    if len(data) > _CONFIG_NBYTES_MAX:
        raise ConfigInvalid(f"{path}: more than {_CONFIG_NBYTES_MAX} bytes")
    try:
        return with_options(RunnerConfig(), tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: not TOML ({error})") from None
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{path}: {error}") from None


def with_options(config: RunnerConfig, options: Mapping[str, object]) -> RunnerConfig:
    """Return the configuration with those options replaced; raise ConfigInvalid for an unknown or impossible one."""
    names = [field.name for field in fields(RunnerConfig)]
    for name in options:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ConfigInvalid(f"unknown option {name!r}; the nearest known one is {nearest!r}")
    return replace(config, **_in_bytes(_of_one_kind(options)))  # type: ignore[arg-type]  # each value is checked by the class itself


def _of_one_kind(options: Mapping[str, object]) -> Mapping[str, object]:
    """Return options where one of the two ways to size a cache takes the place of the other one set before."""
    for name, other in (("cache_experts", "device_memory"), ("device_memory", "cache_experts")):
        if name in options and other not in options:
            return {**options, other: None}
    return options


def _in_bytes(options: Mapping[str, object]) -> Mapping[str, object]:
    """Return options whose sizes are numbers; raise ConfigInvalid."""
    device_memory = options.get("device_memory")
    if isinstance(device_memory, str):
        return {**options, "device_memory": parse_nbytes("device_memory", device_memory)}
    return options


def _check_device(device: object) -> None:
    if not isinstance(device, str):
        raise ConfigInvalid(f"device: a name is expected, {device!r} came")
    try:
        check_device(device)
    except DeviceUnavailable as error:
        raise ConfigInvalid(f"device: {error}") from None


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigInvalid(f"{name}: true or false is expected, {value!r} came")


def _check_whole(name: str, value: object, minimum: int, maximum: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ConfigInvalid(f"{name}: a whole number from {minimum} to {maximum} is expected, {value!r} came")


def _check_number(name: str, value: object, minimum: float, maximum: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not minimum <= value <= maximum:  # type: ignore[arg-type,operator]
        raise ConfigInvalid(f"{name}: a number from {minimum:g} to {maximum:g} is expected, {value!r} came")


def my_runtime_dir() -> RuntimeDir:
    """Return where this user's daemon is met."""
    return runtime_dir(os.environ, os.geteuid())


def fault_point() -> str | None:
    """Return the fault that a test wants of this process; see protocol.fault_points."""
    return os.environ.get("EXPERTD_FAULT_POINT")
