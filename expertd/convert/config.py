"""How a checkpoint is to be quantized: a scheme for each class of tensors, exceptions, the solver. Knows no tensors.

The files in configs/ explain each option; embeddings, norms and gates are always stored in 16 bits.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from expertd.convert.errors import ConfigError
from expertd.convert.overrides import Override, read_overrides
from expertd.convert.words import SIXTEEN_BIT, listed, nearest
from protocol.handles import ExpertKey

_CONFIG_NBYTES_MAX = 1 << 20
_SCHEMES = (SIXTEEN_BIT, "8bit-g64", "4bit-g64", "3bit-g64", "2bit-g16")
_CHOICES = {
    "experts": _SCHEMES,
    "attention": _SCHEMES,
    "head": (SIXTEEN_BIT, "8bit-g64", "4bit-g64"),
    "solver": ("shortcut", "hqq"),
}


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """The scheme of experts, attention and output head, and how codes are found; raise ConfigError for unknown words.

    `override` takes tables as they stand in a file, too.
    """

    experts: str = "4bit-g64"
    attention: str = "4bit-g64"
    head: str = "8bit-g64"
    solver: str = "shortcut"
    refine: bool = True
    override: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            value = getattr(self, option)
            if value not in choices:
                raise ConfigError(f"{option}: one of {listed(choices)} is expected, {value!r:.60} came")
        if not isinstance(self.refine, bool):
            raise ConfigError(f"refine: true or false is expected, {self.refine!r:.60} came")
        object.__setattr__(self, "override", read_overrides(self.override))

    @property
    def solver_text(self) -> str:
        """How codes are found, as a store's manifest says it."""
        return f"{self.solver}, refined" if self.refine else self.solver

    def scheme_of(self, key: ExpertKey) -> str:
        """Return the word for the scheme of that expert."""
        return next((override.scheme for override in reversed(self.override) if override.holds_for(key)), self.experts)


def load_config(path: Path) -> QuantizeConfig:
    """Return the configuration in a TOML file; raise ConfigError naming the file, what was expected and what came."""
    document = _read_toml(path)
    known = [field.name for field in fields(QuantizeConfig)]
    for option in document:
        if option not in known:
            raise ConfigError(f"{path}: {nearest(option, known)}")
    try:
        return QuantizeConfig(**document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    """Return the file's table; its values are checked by the class."""
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_NBYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _CONFIG_NBYTES_MAX:
        raise ConfigError(f"{path}: larger than {_CONFIG_NBYTES_MAX} bytes; a TOML file of a few lines is expected")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from None
