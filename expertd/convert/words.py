"""The words of a configuration, and what is said of one that is not known."""

import difflib
from collections.abc import Sequence
from typing import Final

# Keeps a checkpoint's own 16-bit type; every other word for a scheme is one of protocol.schemes.
SIXTEEN_BIT: Final = "16bit"


def nearest(option: object, known: Sequence[str]) -> str:
    """Return what is wrong with an option that is none of those."""
    match = difflib.get_close_matches(str(option), known, n=1, cutoff=0.0)[0]
    return f"unknown option {option!r:.60}; the nearest known one is {match!r}"


def listed(words: Sequence[str]) -> str:
    """Return the words as a message names them."""
    return ", ".join(repr(word) for word in words)
