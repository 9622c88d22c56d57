"""Sizes as people write them. Pure."""

from protocol.quantities import nbytes_of, what_a_size_is
from runner.errors import ConfigInvalid


def parse_nbytes(name: str, text: str) -> int:
    """Return so many bytes as a size says, like 11GiB or 1.5 GB; raise ConfigInvalid naming the option."""
    nbytes = nbytes_of(text)
    if nbytes is None:
        raise ConfigInvalid(f"{name}: {what_a_size_is()}, {text!r:.40} came")
    return nbytes
