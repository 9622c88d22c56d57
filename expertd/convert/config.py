"""How a checkpoint is to be quantized: a scheme for each class of tensors, and the solver. Knows no tensors.

The files in configs/ explain each option; embeddings, norms and gates are always stored in 16 bits.
"""

import difflib
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from expertd.convert.errors import ConfigError

# "16bit" keeps a checkpoint's own 16-bit type; every other word is a scheme of protocol.schemes.
SIXTEEN_BIT: Final = "16bit"

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
    """The scheme of experts, attention and output head, and the solver; raise ConfigError for an unknown word."""

    experts: str = "4bit-g64"
    attention: str = "4bit-g64"
    head: str = "8bit-g64"
    solver: str = "shortcut"

    def __post_init__(self) -> None:
        for option, value in asdict(self).items():
            if value not in _CHOICES[option]:
                raise ConfigError(f"{option}: one of {_listed(_CHOICES[option])} is expected, {value!r:.60} came")


def load_config(path: Path) -> QuantizeConfig:
    """Return the configuration in a TOML file; raise ConfigError naming the file, what was expected and what came."""
    document = _read_toml(path)
    known = [field.name for field in fields(QuantizeConfig)]
    for option in document:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: unknown option {option!r:.60}; the nearest known one is {nearest!r}")
    try:
        return QuantizeConfig(**document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, str]:
    """Return the file's table; that its values are words is checked by the class."""
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


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(repr(word) for word in words)
