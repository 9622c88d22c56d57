"""Noise that is the same on every machine and with every numpy: a function of the index, no generator's state."""

import numpy as np
from numpy.typing import NDArray

_INDEX_STEP = 0x9E3779B9
_KEY_STEP = 0x85EBCA6B
_UINT32_MASK = 0xFFFFFFFF


def uniform(n: int, key: int) -> NDArray[np.float32]:
    """Return [n] float32, uniform in [-0.5, 0.5) on a grid of 2**-24; the same key gives the same numbers.

    The index, spread by the golden ratio and shifted by the key, goes through the 32-bit mixing function `lowbias32`
    (C. Wellons, public domain), whose upper 24 bits are the number.
    """
    mixed = np.arange(n, dtype=np.uint32) * np.uint32(_INDEX_STEP) + np.uint32(key * _KEY_STEP & _UINT32_MASK)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= mixed >> np.uint32(16)
    return (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)
