"""Sizes as people write them. Pure."""

import re

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,6}))?\s*([A-Za-z]*)", re.ASCII)


def nbytes_of(text: str) -> int | None:
    """Return so many bytes as a size says, like 11GiB or 1.5 GB; None if it says none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[3] not in UNITS:
        return None
    whole, fraction, unit = int(match[1]), match[2] or "", UNITS[match[3]]
    return whole * unit + int(fraction or "0") * unit // int(10 ** len(fraction))


def what_a_size_is() -> str:
    """Return what is expected of a text that should be a size, for an error."""
    return f"a number and one of {', '.join(unit for unit in UNITS if unit)} is expected (as in 11GiB)"
