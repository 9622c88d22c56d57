"""Sizes as people write them. Pure."""

import re

from runner.errors import ConfigInvalid

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,6}))?\s*([A-Za-z]*)", re.ASCII)


def parse_nbytes(name: str, text: str) -> int:
    """Return so many bytes as a size says, like 11GiB or 1.5 GB; raise ConfigInvalid naming the option."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ConfigInvalid(f"{name}: a number and one of {units} is expected (as in 11GiB), {text!r:.40} came")
    whole, fraction, unit = int(match[1]), match[2] or "", _UNITS[match[3]]
    return whole * unit + int(fraction or "0") * unit // int(10 ** len(fraction))
